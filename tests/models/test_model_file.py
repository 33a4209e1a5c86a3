"""Model files: round trips, atomic writes, damaged and foreign files, no code execution."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.adapters import base_folder, ppo_with_adapter, save
from helpers.full_disk import largest_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import (
    PolicyBundle,
    RewardBundle,
    identity,
    load_policy,
    load_reward_model,
    new_policy,
    save_bundle,
    stored_identity,
)
from rlchat.models.networks import Critic, RewardModel
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import format_ranks

CONFIGS: dict[str, dict[str, Any]] = {
    "untied": {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    "tied": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
    "encoder": {"model_type": "distilbert", "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2},
}
IDS = torch.tensor([[258, 72, 105, 260, 259, 0, 33]])
MASK = torch.ones_like(IDS, dtype=torch.bool)


def scrambled(module: torch.nn.Module) -> None:
    """Fills every weight with random numbers, including those that are initialized to zero."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def policy_bundle(tokenizer: ChatTokenizer, config: str = "untied", hidden_dim: int = 0) -> PolicyBundle:
    backbone = Backbone(CONFIGS[config], tokenizer.vocab_size, 16)
    model = new_policy(backbone, tokenizer, hidden_dim).eval()
    scrambled(model)
    return PolicyBundle(model, tokenizer, 16, {"stage": "test", "batches": 3})


def reward_bundle(tokenizer: ChatTokenizer) -> RewardBundle:
    model = RewardModel(Backbone(CONFIGS["encoder"], tokenizer.vocab_size, 16)).eval()
    scrambled(model)
    return RewardBundle(model, tokenizer, 16)


@torch.no_grad()
def outputs(bundle: PolicyBundle) -> tuple[Tensor, Tensor]:
    hidden = bundle.model(IDS, MASK)
    return bundle.model.logits(hidden), bundle.model.values(hidden)


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("hidden_dim", [0, 5])
def test_a_saved_policy_loads_unchanged(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, config: str, hidden_dim: int
) -> None:
    bundle = policy_bundle(byte_tokenizer, config, hidden_dim)
    save_bundle(tmp_path / "new" / "model.pt", bundle)
    loaded = load_policy(tmp_path / "new" / "model.pt")
    for one, other in zip(outputs(loaded), outputs(bundle), strict=True):
        assert torch.equal(one, other)
    assert (loaded.model.hidden_dim, loaded.max_length) == (hidden_dim, 16)
    assert loaded.about == {"stage": "test", "batches": 3}
    assert loaded.tokenizer.fingerprint == byte_tokenizer.fingerprint
    assert (loaded.model.backbone.head is None) == (config != "untied")
    assert not loaded.model.training
    assert torch.equal(loaded.model.unsayable.nonzero().squeeze(1), torch.tensor([256, 257, 258, 259]))


def test_a_saved_reward_model_loads_with_its_mean_and_std(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    bundle = reward_bundle(byte_tokenizer)
    save_bundle(tmp_path / "reward.pt", bundle)
    loaded = load_reward_model(str(tmp_path / "reward.pt"))
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS, MASK), bundle.model(IDS, MASK))
    assert float(loaded.model.mean) == float(bundle.model.mean) != 0
    assert float(loaded.model.std) == float(bundle.model.std) != 1
    assert not loaded.model.training


def test_a_policy_built_from_a_folder_saves_and_loads_unchanged(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False, pad_token_id=0
    )
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    backbone = Backbone(
        str(tmp_path / "gpt2"), byte_tokenizer.vocab_size, 16, rows=[(token,) for token in range(256)] + [()] * 5
    )
    bundle = PolicyBundle(new_policy(backbone, byte_tokenizer).eval(), byte_tokenizer, 16)
    save_bundle(tmp_path / "model.pt", bundle)
    for one, other in zip(outputs(load_policy(tmp_path / "model.pt")), outputs(bundle), strict=True):
        assert torch.equal(one, other)


def test_a_model_file_needs_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = tmp_path / "mine.tiktoken"
    ranks.write_bytes(format_ranks({**{bytes([i]): i for i in range(256)}, b"th": 256, b"the": 257}))
    tokenizer = ChatTokenizer(str(ranks))
    save_bundle(tmp_path / "model.pt", policy_bundle(tokenizer))
    ranks.unlink()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: pytest.fail(f"asked for the encoding {name}"))
    loaded = load_policy(tmp_path / "model.pt").tokenizer
    assert loaded.encode("the") == [257]
    assert loaded.decode([257, 33]) == "the!"
    assert (loaded.name, loaded.pad_id, loaded.end_id) == ("mine", tokenizer.pad_id, tokenizer.end_id)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_the_identity_of_a_file_is_read_without_loading_it(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole model, of a version, and of an adapter whose base is not there."""
    path, version, adapter = (tmp_path / name for name in ("model.pt", "version.pt", "adapter.pt"))
    save_bundle(path, policy_bundle(byte_tokenizer))
    original = load_policy(path)
    original.about["learned"] = {"model_id": identity(original)}
    next(original.model.backbone.parameters()).data.add_(1)
    save_bundle(version, original)
    for weights in (False, True):
        model_id, digest = stored_identity(path, weights)
        assert (model_id, digest[:20]) == (identity(load_policy(path)), model_id)
        inherited, other = stored_identity(version, weights)
        assert inherited == identity(load_policy(version)) == model_id
        assert other != digest
    save_bundle(tmp_path / "reward.pt", reward_bundle(byte_tokenizer))
    with pytest.raises(UserError, match=r"reward\.pt: contains a reward model, expected a chat model"):
        stored_identity(tmp_path / "reward.pt")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    save(ppo_with_adapter(base_model=base_folder(tmp_path / "base")), adapter)
    expected = identity(load_policy(adapter))
    shutil.rmtree(tmp_path / "base")
    assert stored_identity(adapter)[0] == expected != ""


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "interrupt"],
)
def test_a_failed_write_leaves_the_existing_file_unchanged(
    byte_tokenizer: ChatTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    path = tmp_path / "model.pt"
    save_bundle(path, policy_bundle(byte_tokenizer))
    before = path.read_bytes()

    def half(content: object, file: Any) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr("torch.save", half)
    with pytest.raises(raised) as caught:
        save_bundle(path, policy_bundle(byte_tokenizer, hidden_dim=3))
    assert raised is KeyboardInterrupt or "No space left on device" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_existing_file_unchanged(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path, bundle = tmp_path / "model.pt", policy_bundle(byte_tokenizer)
    path.write_bytes(b"old")
    with largest_file(10_000), pytest.raises(UserError, match=r"cannot be written: .*; the existing file is unchanged"):
        save_bundle(path, bundle)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_refused(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"model\.pt: cannot be written"):
        save_bundle(tmp_path / "file" / "model.pt", policy_bundle(byte_tokenizer))
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(UserError, match=r"model\.pt: cannot be written"):
        save_bundle(tmp_path / "model.pt", policy_bundle(byte_tokenizer))


# ---- damaged and foreign files ---------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self.trace), os.O_CREAT)


def test_a_model_file_that_contains_code_is_refused_and_the_code_does_not_run(
    byte_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path, trace = tmp_path / "model.pt", tmp_path / "it-ran"
    save_bundle(path, policy_bundle(byte_tokenizer))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "about": Payload(trace)}, path)
    torch.load(path, weights_only=False)
    assert trace.exists()  # the payload works when unpickling is unrestricted
    trace.unlink()
    for load in (load_policy, load_reward_model):
        with pytest.raises(UserError, match="something other than tensors and plain values"):
            load(path)
    path.write_bytes(pickle.dumps(Payload(trace), protocol=2))  # also as a bare pickle, outside a zip archive
    with pytest.raises(UserError, match="something other than tensors and plain values"):
        load_policy(path)
    assert not trace.exists()


def check_one_sentence(error: pytest.ExceptionInfo[UserError], path: Path) -> None:
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999], ids=str)
def test_a_truncated_model_file_is_refused(byte_tokenizer: ChatTokenizer, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "model.pt"
    save_bundle(path, policy_bundle(byte_tokenizer))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(UserError) as error:
        load_policy(path)
    check_one_sentence(error, path)


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("words.txt", "hello")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text('{"messages": []}\n' * 20),
        lambda path: path.write_bytes(bytes(range(256)) * 20),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"state_dict": {"weight": torch.ones(2)}}, path),
        lambda path: torch.save([torch.ones(2)], path),
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        a_zip,
    ],
    ids=["text", "bytes", "empty", "another checkpoint", "a list", "a module", "a zip"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "model.pt"
    write(path)
    for load in (load_policy, load_reward_model):
        with pytest.raises(UserError) as error:
            load(path)
        check_one_sentence(error, path)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    folder = r"this is a folder, not a model file; .*--model.base_model"
    for path, reason in ((tmp_path / "nothing.pt", "no such model file; train one"), (tmp_path, folder)):
        with pytest.raises(UserError, match=reason) as error:
            load_policy(path)
        check_one_sentence(error, path)


def test_the_wrong_kind_of_model_is_named(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    policy, reward = tmp_path / "policy.pt", tmp_path / "reward.pt"
    save_bundle(policy, policy_bundle(byte_tokenizer))
    save_bundle(reward, reward_bundle(byte_tokenizer))
    with pytest.raises(UserError, match="contains a reward model, expected a chat model"):
        load_policy(reward)
    with pytest.raises(UserError, match="contains a chat model, expected a reward model"):
        load_reward_model(policy)


def damaged(path: Path, bytes_only: ChatTokenizer, /, **change: Any) -> dict[str, Any]:
    """Writes a policy's model file with the entries ``change``; returns its content."""
    save_bundle(path, policy_bundle(bytes_only))
    content = {**torch.load(path, weights_only=True), **change}
    torch.save(content, path)
    return content


def refusal(path: Path, content: object | None = None) -> str:
    """The error of loading ``path``, into which ``content`` is written first, without the path."""
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_policy(path)
    check_one_sentence(error, path)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 4}, "unsupported model file version 4, expected 1 to 3; update rlchat"),
        ({"version": None}, "unsupported model file version None, expected 1 to 3; update rlchat"),
        ({"format": "other"}, "not an rlchat model file; `rlchat fit` writes them to checkpoints/*.pt"),
        ({"kind": "critic"}, "unknown kind of model 'critic'; update rlchat or create the file again"),
        ({"kind": 3}, "damaged model file, kind is 3, expected str"),
        ({"backbone": None}, "damaged model file, backbone is None, expected str"),
        ({"hidden_dim": "five"}, "damaged model file, hidden_dim is a str, expected int"),
        ({"hidden_dim": -1}, "damaged model file, hidden_dim is -1, expected int"),
        ({"hidden_dim": True}, "damaged model file, hidden_dim is True, expected int"),
        ({"max_length": 1.5}, "damaged model file, max_length is 1.5, expected int"),
        ({"tokenizer": []}, "damaged model file, tokenizer is a list, expected dict"),
        ({"about": None}, "damaged model file, about is None, expected dict"),
        ({"state": torch.ones(2)}, "damaged model file, state is a Tensor, expected dict"),
        ({"state": {"weight": 1}}, "damaged model file, weight weight is 1, expected a tensor"),
        ({"critic": 3}, "damaged model file, critic is 3, expected dict"),
        ({"critic": {}}, "damaged model file, backbone is None, expected str"),
        ({"backbone": "no JSON"}, "damaged model file, its model cannot be built: Expecting value"),
        ({"backbone": "[1]"}, "damaged model file, its model cannot be built: "),
        ({"state": {"weight": torch.ones(2)}}, "damaged model file, it lacks weight backbone.head.weight"),
        ({"hidden_dim": 7}, "damaged model file, it lacks weight value_head.0.bias"),
    ],
    ids=str,
)
def test_another_version_or_a_damaged_entry_is_named(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    damaged(tmp_path / "model.pt", byte_tokenizer, **change)
    assert refusal(tmp_path / "model.pt").startswith(expected)


def test_each_missing_entry_is_named(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    content = damaged(path, byte_tokenizer)
    for name in content.keys() - {"format", "version"}:
        rest = {key: value for key, value in content.items() if key != name}
        assert refusal(path, rest) == f"incomplete model file, {name} missing; create it again"
    for name in ("format", "version"):
        refusal(path, {key: value for key, value in content.items() if key != name})


def test_each_damaged_part_of_the_tokenizer_is_reported(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    content = damaged(path, byte_tokenizer)
    for name in content["tokenizer"]:
        for tokenizer in (
            {key: value for key, value in content["tokenizer"].items() if key != name},
            {**content["tokenizer"], name: 3},
        ):
            refusal(path, {**content, "tokenizer": tokenizer})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(byte_tokenizer: ChatTokenizer, tmp_path: Path, value: float) -> None:
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    content["state"]["backbone.head.weight"][3, 2] = value
    expected = "weight backbone.head.weight has NaN or infinite values; training diverged, use another file"
    assert refusal(tmp_path / "model.pt", content) == expected


def test_infinite_weights_of_opposite_signs_are_refused(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    content["state"]["backbone.head.weight"][0, :2] = torch.tensor([float("inf"), -float("inf")])
    assert "weight backbone.head.weight has NaN or infinite values" in refusal(tmp_path / "model.pt", content)


def test_finite_weights_whose_sum_overflows_are_loaded(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    content["state"]["backbone.head.weight"][0, :2] = 3e38
    torch.save(content, tmp_path / "model.pt")
    assert load_policy(tmp_path / "model.pt").model.backbone.head_weight[0, 1].item() == pytest.approx(3e38)


def test_a_weight_of_another_shape_is_named_with_both_shapes(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    content["state"]["backbone.head.weight"] = torch.ones(261, 15)
    expected = "damaged model file, weight backbone.head.weight has shape (261, 15), expected (261, 16)"
    assert refusal(tmp_path / "model.pt", content) == expected


def test_an_unexpected_weight_is_named(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    content["state"]["extra"] = torch.ones(2)
    assert refusal(tmp_path / "model.pt", content) == "damaged model file, it has the unexpected weight extra"


def test_a_damaged_critic_is_reported(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path, bundle = tmp_path / "model.pt", policy_bundle(byte_tokenizer)
    bundle.critic = Critic(Backbone(CONFIGS["tied"], byte_tokenizer.vocab_size, 16), 4)
    save_bundle(path, bundle)
    content = torch.load(path, weights_only=True)
    content["critic"]["state"]["value_head.2.bias"] = torch.ones(3)
    assert refusal(path, content) == "damaged model file, weight value_head.2.bias has shape (3,), expected (1,)"
    content["critic"]["state"]["value_head.2.bias"] = torch.tensor([float("nan")])
    assert "weight value_head.2.bias has NaN or infinite values" in refusal(path, content)


def test_a_model_family_of_a_newer_transformers_is_reported_as_such(
    byte_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    config = {**json.loads(content["backbone"]), "model_type": "llama9"}
    expected = (
        f"transformers {transformers.__version__} does not have the model family 'llama9'; the file was probably made "
        f"with a newer version, update transformers"
    )
    assert refusal(tmp_path / "model.pt", {**content, "backbone": json.dumps(config)}) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "has shape"),  # terabytes, never allocated
        ({"vocab_size": 2**40}, "has shape"),
        ({"num_hidden_layers": 10**9}, "damaged model file, 1000000000 layers but 14 weights"),
    ],
    ids=["width", "vocabulary", "layers"],
)
def test_a_small_file_cannot_ask_for_much_memory(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, change: dict[str, int], expected: str
) -> None:
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    config = {**json.loads(content["backbone"]), **change}
    assert expected in refusal(tmp_path / "model.pt", {**content, "backbone": json.dumps(config)})


def test_large_buffers_that_the_configuration_asks_for_are_refused(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that is computed from the configuration is in no file, so no stored shape limits it."""
    damaged(tmp_path / "model.pt", byte_tokenizer)
    monkeypatch.setattr("rlchat.models.model_file._LARGEST_BUFFERS", 100)
    assert refusal(tmp_path / "model.pt").startswith("damaged model file, its configuration asks for ")


def test_an_archive_that_expands_is_refused(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """torch.save does not compress; a compressed file of 100 kB could expand to 100 MB of zeros."""
    path = tmp_path / "model.pt"
    save_bundle(path, policy_bundle(byte_tokenizer))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["archive/data/99"] = bytes(10**7)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 10**6
    assert re.match(
        r"expands to 10,\d{3},\d{3} bytes, more than the size of the file; not an rlchat model file", refusal(path)
    )


def test_a_weight_that_claims_more_than_is_stored_is_refused(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """A view with stride 0 stores one number and claims 10¹² of them."""
    content = damaged(tmp_path / "model.pt", byte_tokenizer)
    content["state"]["backbone.head.weight"] = torch.ones(1).expand(10**6, 10**6)
    expected = "damaged model file, weight backbone.head.weight is larger than its stored data"
    assert refusal(tmp_path / "model.pt", content) == expected
