"""Model files with the adapter alone: what they contain, how they find their base, and their errors."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import LORA, SHAPE, base_folder, outputs, ppo_with_adapter, reward_with_adapter, save
from helpers.hf_tokenizers import tokenizer_folder, tokenizer_json
from helpers.small_ppo import fit, ppo, rolled_out
from transformers import ElectraConfig, ElectraForMaskedLM, RobertaConfig, RobertaForMaskedLM

from rlchat.__main__ import main
from rlchat.chat.interface import ChatInterface
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import load_policy, load_reward_model
from rlchat.ppo.module import PPOModule
from rlchat.rewards import LearnedQuality, Reply
from rlchat.training.initial_model import open_policy
from rlchat.training.sft import SFTModule


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base_folder(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: str) -> Path:
    return save(ppo_with_adapter(base_model=base), tmp_path / "adapter.pt")


# ---- the same model as the merged file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_dim": 4, "lora_targets": ["q_proj", "down_proj"]}, {"critic": "separate", "train_layers": 1}],
    ids=["shared", "hidden", "separate"],
)
def test_an_adapter_file_gives_the_same_model_as_the_merged_file(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    module = ppo_with_adapter(base_model=base, max_length=32, **options)
    alone, merged = save(module, tmp_path / "alone.pt"), save(module, tmp_path / "merged.pt", merge_adapter=True)
    monkeypatch.setitem(sys.modules, "peft", None)  # it is not needed to load a file
    one, other = load_policy(alone), load_policy(merged)
    assert (one.critic is None) == ("critic" not in options)
    assert one.model.state_dict().keys() == other.model.state_dict().keys()
    for name, weight in other.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], weight), name
    for mine, theirs in zip(outputs(one), outputs(other), strict=True):
        assert torch.equal(mine, theirs)
    assert (outputs(one)[0] - outputs(open_policy(base, None, 32, None, None))[0]).abs().max() > 0.1
    assert (one.tokenizer.fingerprint, one.max_length) == (module.tokenizer.fingerprint, 32)
    assert not one.model.training


def test_a_reward_model_keeps_its_head_and_its_mean_and_std(tmp_path: Path, base: str) -> None:
    module = reward_with_adapter(base_model=base)
    one = load_reward_model(save(module, tmp_path / "alone.pt"))
    other = load_reward_model(save(module, tmp_path / "merged.pt", merge_adapter=True))
    assert torch.equal(outputs(one)[0], outputs(other)[0])
    assert float(one.model.mean) == pytest.approx(0.3)


def test_an_adapter_belongs_to_a_model_file_or_to_another_adapter(tmp_path: Path, base: str) -> None:
    first = ppo_with_adapter(base_model=base)
    for start in (save(first, tmp_path / "sft.pt"), save(first, tmp_path / "merged.pt", merge_adapter=True)):
        second = ppo_with_adapter(init_from=str(start))
        alone, merged = save(second, tmp_path / "alone.pt"), save(second, tmp_path / "both.pt", merge_adapter=True)
        for mine, theirs in zip(outputs(load_policy(alone)), outputs(load_policy(merged)), strict=True):
            assert torch.equal(mine, theirs)


def test_an_adapter_belongs_to_a_gguf_file(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = str(save(ppo_with_adapter(base_model=base), tmp_path / "m.pt", merge_adapter=True))
    assert main(["export", whole, "--to", "gguf", str(tmp_path / "base.gguf")]) == 0
    module = ppo_with_adapter(base_model=str(tmp_path / "base.gguf"), max_length=32)
    alone, merged = save(module, tmp_path / "alone.pt"), save(module, tmp_path / "merged.pt", merge_adapter=True)
    assert torch.equal(outputs(load_policy(alone))[0], outputs(load_policy(merged))[0])
    content = torch.load(alone, weights_only=True)
    assert content["base"]["name"] == str(tmp_path / "base.gguf")


def test_the_option_of_a_run_and_the_next_stage(tmp_path: Path, base: str) -> None:
    module = PPOModule(base_model=base, max_new_tokens=8, learning_rate=1e-2, minibatches=1, **LORA)
    fit(module, 1)
    module.save_bundle(tmp_path / "model.pt")
    assert "backbone" not in torch.load(tmp_path / "model.pt", weights_only=True)
    expected = rolled_out(module)
    found = rolled_out(PPOModule(init_from=str(tmp_path / "model.pt"), max_new_tokens=8))
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.ref_logprobs, expected.old_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=0)


# ---- what the file contains ------------------------------------------------------------------------------------------


def test_the_file_contains_the_adapter_and_the_heads_and_is_small(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512}
    base = base_folder(tmp_path / "base", **shape)
    module = ppo_with_adapter(base_model=base, lora_targets=["q_proj"])
    alone, merged = save(module, tmp_path / "alone.pt"), save(module, tmp_path / "merged.pt", merge_adapter=True)
    assert alone.stat().st_size < merged.stat().st_size / 50
    content = torch.load(alone, weights_only=True)
    layers = [f"backbone.transformer.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    matrices = {f"{layer}.{matrix}.weight" for layer in layers for matrix in ("lora_A", "lora_B")}
    assert content["state"].keys() == matrices | {"value_head.weight", "value_head.bias"}
    assert content["alpha"] == 6.0
    assert content["base"].keys() == {"kind", "name", "fingerprint"}
    assert (content["base"]["kind"], content["base"]["name"]) == ("base_model", base)


def test_a_critic_with_a_base_of_its_own_is_whole(tmp_path: Path, base: str) -> None:
    rewards = save(reward_with_adapter(base_model=base), tmp_path / "reward.pt")
    module = ppo_with_adapter(base_model=base, critic="separate", critic_init=str(rewards))
    alone, merged = save(module, tmp_path / "alone.pt"), save(module, tmp_path / "merged.pt", merge_adapter=True)
    assert "backbone" in torch.load(alone, weights_only=True)["critic"]
    for mine, theirs in zip(outputs(load_policy(alone)), outputs(load_policy(merged)), strict=True):
        assert torch.equal(mine, theirs)


# ---- where the base is -----------------------------------------------------------------------------------------------


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter whose base has moved, and where the base is now; and a reward model beside it."""
    (tmp_path / "before").mkdir()
    old = base_folder(tmp_path / "before" / "base")
    path = save(ppo_with_adapter(base_model=old), tmp_path / "adapter.pt")
    save(reward_with_adapter(base_model=old), tmp_path / "reward.pt")
    now = tmp_path / "somewhere" / "else"
    now.parent.mkdir()
    shutil.move(old, now)
    return path, now


def test_a_base_beside_the_adapter_is_found(moved: tuple[Path, Path], tmp_path: Path) -> None:
    path, now = moved
    with pytest.raises(UserError, match=r"adapter.pt contains an adapter, and the base model .*before/base that it "):
        load_policy(path)
    shutil.move(now, tmp_path / "base")
    load_policy(path)


def test_the_new_place_is_an_option_everywhere(moved: tuple[Path, Path], tmp_path: Path) -> None:
    path, now = str(moved[0]), str(moved[1])
    expected = outputs(load_policy(path, base_model=now))[0]
    assert torch.equal(outputs(open_policy(now, None, None, None, path))[0], expected)
    chat = ChatInterface(path, device="cpu", base_model=now)
    assert torch.equal(outputs(chat.bundle)[0], expected)
    assert main(["chat", path, "Hello", "--base-model", now, "--max_new_tokens", "2", "--device", "cpu"]) == 0
    assert main(["export", path, "--base-model", now, "--to", "hf", str(tmp_path / "out")]) == 0
    assert torch.allclose(outputs(open_policy(str(tmp_path / "out"), None, 64, None, None))[0], expected, atol=1e-4)
    factor = LearnedQuality(str(tmp_path / "reward.pt"), base_model=now)
    assert factor.describe()["init_args"]["base_model"] == now
    score = factor([Conversation((Message("user", "Hello"),))], [Reply("Hi.", 2, True)])
    assert score.isfinite().all()
    with pytest.raises(UserError, match=r"reward.pt contains an adapter, and the base model .* was not found"):
        LearnedQuality(str(tmp_path / "reward.pt")).reward_model  # noqa: B018


def test_without_its_base_an_error_says_which_and_how_to_pass_it(
    moved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(moved[0]), "Hello"]) == 2
    error = capsys.readouterr().err
    assert "put it at that path or beside" in error
    assert "or pass its new path (--base-model, or base_model in a configuration)" in error


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_adapter_for_another_base_is_refused(adapter: Path, tmp_path: Path, base: str) -> None:
    other = base_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"contains an adapter for another base than .*other: it belongs to the base m"):
        load_policy(adapter, base_model=other)
    wider = base_folder(tmp_path / "wider", hidden_size=64)
    with pytest.raises(UserError, match="another base"):
        open_policy(wider, None, None, None, str(adapter))


def test_an_adapter_for_a_model_file_that_was_trained_again_is_refused(tmp_path: Path, base: str) -> None:
    start = save(ppo_with_adapter(base_model=base), tmp_path / "sft.pt")
    path = save(ppo_with_adapter(init_from=str(start)), tmp_path / "adapter.pt")
    module = ppo_with_adapter(base_model=base)
    torch.nn.init.normal_(module.model.backbone.get_parameter("transformer.layers.1.mlp.up_proj.lora_A.default.weight"))
    save(module, start)
    with pytest.raises(UserError, match=r"another base than .*sft.pt: it belongs to the model file"):
        load_policy(path)
    start.unlink()
    with pytest.raises(UserError, match=r"the model file .*sft.pt that it belongs to was not found"):
        load_policy(path)


def test_a_base_that_fails_to_load_is_named_with_the_reason(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"for the base model .*, which cannot be loaded from .*: .* contains no config.json"
    ):
        load_policy(adapter, base_model=str(tmp_path / "empty"))


def test_a_whole_model_needs_no_base(tmp_path: Path, base: str) -> None:
    merged = save(ppo_with_adapter(base_model=base), tmp_path / "merged.pt", merge_adapter=True)
    with pytest.raises(UserError, match="contains all weights and no adapter, so it needs no base model; leave out"):
        load_policy(merged, base_model=base)
    with pytest.raises(UserError, match="cannot be combined, because the model file contains a backbone"):
        open_policy(base, None, None, None, str(merged))


def test_only_an_adapter_of_weights_that_can_be_loaded_again_is_kept_alone(encoding: str, base: str) -> None:
    with pytest.raises(UserError, match=r"merge_adapter false needs an adapter; set --model.adapter lora"):
        ppo(encoding, merge_adapter=False)
    with pytest.raises(UserError, match="needs a base model that can be loaded again, and this one has random"):
        ppo(encoding, **LORA)
    with pytest.raises(UserError, match="needs a base model that can be loaded again"):
        ppo_with_adapter(base_model=base, new_embeddings=True)


_Q = "backbone.transformer.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 3}, "damaged model file, base is 3, expected dict"),
        ({"base": {"name": "x"}}, "damaged model file, its base is not described; create it again"),
        ({"alpha": float("nan")}, "damaged model file, alpha is nan, expected a positive number"),
        ({"alpha": 2}, "damaged model file, alpha is 2, expected float"),
        ({"hidden_dim": 10**9}, "damaged model file, it lacks weight value_head.0.bias"),
        ({f"{_Q}.lora_A.weight": torch.ones(2, 7)}, r"q_proj has the shapes \(2, 7\) and \(32, 2\), expected"),
        ({f"{_Q}.lora_A.weight": None}, "the adapter of transformer.layers.0.self_attn.q_proj does not .* incomplete"),
        (
            {f"{_Q}.lora_A.weight": torch.ones(1, 32), f"{_Q}.lora_B.weight": torch.ones(32, 1)},
            "with the same r in all layers",
        ),
        ({f"{_Q}.lora_A": torch.ones(2, 32)}, "has the unexpected weight transformer.layers.0.self_attn.q_proj.lora_A"),
        ({"backbone.transformer.norm.lora_A.weight": torch.ones(1, 1)}, "norm does not belong to a linear layer"),
        ({"backbone.head.lora_A.weight": torch.ones(1, 1)}, "has the unexpected weight head.lora_A.weight"),
        ({"base": {"kind": [], "name": "x", "fingerprint": "y"}}, "damaged model file, its base is not described"),
        ({"backbone.transformer.norm.weight": torch.ones(32)}, "has the unexpected weight backbone.transformer.norm.w"),
        ({"value_head.bias": torch.ones(2)}, r"weight value_head.bias has shape \(2,\), expected \(1,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_adapter_file_is_refused(adapter: Path, change: dict[str, Any], message: str) -> None:
    content = torch.load(adapter, weights_only=True)
    for name, value in change.items():
        place = content if name in content else content["state"]
        if value is None:
            del place[name]
        else:
            place[name] = value
    torch.save(content, adapter)
    with pytest.raises(UserError, match=message):
        load_policy(adapter)


def test_a_circle_of_adapters_ends(tmp_path: Path, base: str) -> None:
    start = save(ppo_with_adapter(base_model=base), tmp_path / "a.pt")
    path = save(ppo_with_adapter(init_from=str(start)), tmp_path / "b.pt")
    shutil.copy(path, start)  # a.pt now belongs to a.pt
    with pytest.raises(UserError, match="the adapter belongs to an adapter, and so on for 8 files; merge one of them"):
        load_policy(path)


def test_a_base_whose_head_or_pooler_is_random(tmp_path: Path) -> None:
    """RoBERTa's files have no pooler, and ELECTRA's no head that fits: each load draws other values."""
    shape = {**SHAPE, "vocab_size": 450, "max_position_embeddings": 140}
    tokenizer_folder(tmp_path / "roberta", tokenizer_json())
    RobertaForMaskedLM(RobertaConfig(**shape)).save_pretrained(tmp_path / "roberta")
    digests = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        digests.add(Backbone(str(tmp_path / "roberta"), 40, 32, rows=[(0,)] * 40).fingerprint)
    assert len(digests) == 1
    tokenizer_folder(tmp_path / "electra", tokenizer_json())
    ElectraForMaskedLM(ElectraConfig(**shape, embedding_size=8)).save_pretrained(tmp_path / "electra")
    with pytest.raises(UserError, match="merge_adapter"):
        SFTModule(base_model=str(tmp_path / "electra"), max_length=32, **LORA)


@pytest.mark.parametrize("name", ["~nobody-here/x", "x" * 5000, "a\x1b[2Jb"])
def test_a_name_of_a_base_that_cannot_be_a_path(adapter: Path, name: str) -> None:
    content = torch.load(adapter, weights_only=True)
    content["base"]["name"] = name
    torch.save(content, adapter)
    with pytest.raises(UserError):
        load_policy(adapter)
