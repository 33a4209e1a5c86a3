"""The bundle: everything comes back, nothing half-written stays, nothing in it runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.full_disk import largest_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import (
    PolicyBundle,
    RewardBundle,
    load_policy,
    load_reward_model,
    new_policy,
    save_bundle,
)
from rlchat.models.networks import RewardModel
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer, format_ranks

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
    """Numbers everywhere, also where modules begin at zero."""
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
def says(bundle: PolicyBundle) -> tuple[Tensor, Tensor]:
    hidden = bundle.model(IDS, MASK)
    return bundle.model.logits(hidden), bundle.model.values(hidden)


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("hidden_dim", [0, 5])
def test_a_policy_comes_back(byte_tokenizer: ChatTokenizer, tmp_path: Path, config: str, hidden_dim: int) -> None:
    bundle = policy_bundle(byte_tokenizer, config, hidden_dim)
    save_bundle(tmp_path / "new" / "model.pt", bundle)
    loaded = load_policy(tmp_path / "new" / "model.pt")
    for one, other in zip(says(loaded), says(bundle), strict=True):
        assert torch.equal(one, other)
    assert (loaded.model.hidden_dim, loaded.max_length) == (hidden_dim, 16)
    assert loaded.about == {"stage": "test", "batches": 3}
    assert loaded.tokenizer.fingerprint == byte_tokenizer.fingerprint
    assert (loaded.model.backbone.head is None) == (config != "untied")
    assert not loaded.model.training
    assert torch.equal(loaded.model.unsayable.nonzero().squeeze(1), torch.tensor([256, 257, 258, 259]))


def test_a_reward_model_comes_back_with_its_scale(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    bundle = reward_bundle(byte_tokenizer)
    save_bundle(tmp_path / "reward.pt", bundle)
    loaded = load_reward_model(str(tmp_path / "reward.pt"))
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS, MASK), bundle.model(IDS, MASK))
    assert float(loaded.model.mean) == float(bundle.model.mean) != 0
    assert float(loaded.model.std) == float(bundle.model.std) != 1
    assert not loaded.model.training


def test_a_model_that_was_loaded_from_a_folder_comes_back(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False, pad_token_id=0
    )
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    backbone = Backbone(str(tmp_path / "gpt2"), byte_tokenizer.vocab_size, 16, kept_rows=256)
    bundle = PolicyBundle(new_policy(backbone, byte_tokenizer).eval(), byte_tokenizer, 16)
    save_bundle(tmp_path / "model.pt", bundle)
    for one, other in zip(says(load_policy(tmp_path / "model.pt")), says(bundle), strict=True):
        assert torch.equal(one, other)


def test_a_bundle_needs_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "interrupt"],
)
def test_a_failing_write_leaves_what_was_there(
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


def test_a_disk_that_is_full_in_earnest(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path, bundle = tmp_path / "model.pt", policy_bundle(byte_tokenizer)
    path.write_bytes(b"old")
    with largest_file(10_000), pytest.raises(UserError, match=r"cannot be written: .*; what was there"):
        save_bundle(path, bundle)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"model\.pt: cannot be written"):
        save_bundle(tmp_path / "file" / "model.pt", policy_bundle(byte_tokenizer))
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(UserError, match=r"model\.pt: cannot be written"):
        save_bundle(tmp_path / "model.pt", policy_bundle(byte_tokenizer))


# ---- what is no bundle -----------------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self.trace), os.O_CREAT)


def test_a_bundle_with_code_in_it_is_refused_and_does_not_run(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pt", tmp_path / "it-ran"
    save_bundle(path, policy_bundle(byte_tokenizer))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "about": Payload(trace)}, path)
    torch.load(path, weights_only=False)
    assert trace.exists()  # so the payload is live
    trace.unlink()
    for load in (load_policy, load_reward_model):
        with pytest.raises(UserError, match="something other than tensors and plain values"):
            load(path)
    path.write_bytes(pickle.dumps(Payload(trace), protocol=2))  # and without the archive around it
    with pytest.raises(UserError, match="something other than tensors and plain values"):
        load_policy(path)
    assert not trace.exists()


def one_sentence(error: pytest.ExceptionInfo[UserError], path: Path) -> None:
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999], ids=str)
def test_a_truncated_bundle_is_refused(byte_tokenizer: ChatTokenizer, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "model.pt"
    save_bundle(path, policy_bundle(byte_tokenizer))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(UserError) as error:
        load_policy(path)
    one_sentence(error, path)


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
        one_sentence(error, path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(UserError, match="no such model") as error:
            load_policy(path)
        one_sentence(error, path)


def test_the_other_kind_is_named(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    policy, reward = tmp_path / "policy.pt", tmp_path / "reward.pt"
    save_bundle(policy, policy_bundle(byte_tokenizer))
    save_bundle(reward, reward_bundle(byte_tokenizer))
    with pytest.raises(UserError, match="the bundle of a reward model, where that of a chat model is needed"):
        load_policy(reward)
    with pytest.raises(UserError, match="the bundle of a chat model, where that of a reward model is needed"):
        load_reward_model(policy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "a bundle of version 2, this rlchat reads 1"),
        ({"version": None}, "a bundle of version None"),
        ({"format": "other"}, "not a bundle of rlchat"),
        ({"kind": "critic"}, "parts are missing"),
        ({"state": {"weight": torch.ones(2)}}, "its weights do not fit"),
        ({"hidden_dim": 7}, "its weights do not fit"),
    ],
    ids=str,
)
def test_another_version_or_a_misfit_is_refused(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "model.pt"
    save_bundle(path, policy_bundle(byte_tokenizer))
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(UserError, match=says) as error:
        load_policy(path)
    one_sentence(error, path)


def test_every_part_is_missed(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_bundle(path, policy_bundle(byte_tokenizer))
    content = torch.load(path, weights_only=True)
    for name in content:
        torch.save({key: value for key, value in content.items() if key != name}, path)
        with pytest.raises(UserError) as error:
            load_policy(path)
        one_sentence(error, path)
