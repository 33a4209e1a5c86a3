"""An exported folder in transformers, in a process without rlchat: the same ids, logits and greedy responses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.export import write_folder, write_safetensors
from rlchat.export.folder import FILES
from rlchat.export.weights import causal_lm, save_model, saved_names
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, load_policy, new_policy
from rlchat.models.sampling import Sampling, addressed_uniforms, generate
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

OLD_MODEL = Path(__file__).parents[1] / "data" / "v0_1" / "ppo_model.pt"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4},
}
CONVERSATIONS = [
    [("user", "Hello, how are you?")],
    [("system", "Be brief.\n"), ("user", " two  spaces "), ("assistant", "\nYes.  "), ("user", "12345 naïve 你好 🙂")],
    [("user", "a"), ("assistant", ""), ("user", "\n\n \n")],
]
NEW_TOKENS = 12
READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for conversation in json.loads(sys.argv[2]):
        messages = [{"role": role, "content": text} for role, text in conversation]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].tolist()
        reply = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=int(sys.argv[3]))[0][len(ids):]
        rows.append({"ids": ids, "logits": logits, "reply": reply.tolist()})
    found[folder] = {"rows": rows, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
                     "max_length": tokenizer.model_max_length, "dtype": str(model.dtype)}
assert not [name for name in sys.modules if name.partition(".")[0] == "rlchat"]
print(json.dumps(found))
"""


def random_bundle(name: str, tokenizer: ChatTokenizer) -> PolicyBundle:
    """An untrained policy with weights large enough for its tokens to depend on the whole context."""
    torch.manual_seed(3)
    backbone = Backbone(SHAPES[name], tokenizer.vocab_size, 128)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.normal_(std=0.4) if weight.dim() == 2 else weight.add_(torch.randn_like(weight) * 0.1)
    return PolicyBundle(new_policy(backbone, tokenizer), tokenizer, 128)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Each bundle, and what transformers makes of its folder in a process of its own."""
    folder = tmp_path_factory.mktemp("exported")
    bundles = {name: random_bundle(name, tokenizer) for name in SHAPES} | {"version 0.1": load_policy(OLD_MODEL)}
    for name, bundle in bundles.items():
        bundle.model.eval()
        write_folder(bundle, folder / name, "A card.")
    folders = json.dumps([str(folder / name) for name in bundles])
    run = subprocess.run(
        [sys.executable, "-c", READER, folders, json.dumps(CONVERSATIONS), str(NEW_TOKENS)],
        cwd=folder,  # not the repository, so that rlchat's modules are not beside the script
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    read = json.loads(run.stdout.splitlines()[-1])
    return {name: (bundle, read[str(folder / name)], folder / name) for name, bundle in bundles.items()}


def prompt_of(bundle: PolicyBundle, conversation: list[tuple[str, str]]) -> list[int]:
    messages = tuple(Message(role, text) for role, text in conversation)  # type: ignore[arg-type]
    return bundle.tokenizer.render_prompt(Conversation(messages)).ids


@torch.no_grad()
def logits_of(bundle: PolicyBundle, ids: list[int]) -> Tensor:
    row = torch.tensor([ids])
    return bundle.model.logits(bundle.model(row, torch.ones_like(row, dtype=torch.bool)))[0]


def greedy(bundle: PolicyBundle, ids: list[int]) -> list[int]:
    row, tokenizer = torch.tensor([ids]), bundle.tokenizer
    found = generate(
        bundle.model,
        row,
        torch.ones_like(row, dtype=torch.bool),
        Sampling(NEW_TOKENS, temperature=0),
        addressed_uniforms(0, 0, torch.tensor([0])),
        end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
    )
    return found.ids[0][found.mask[0].bool()].tolist()


@pytest.mark.parametrize("name", [*SHAPES, "version 0.1"])
def test_transformers_computes_what_rlchat_computes(exported: dict[str, Any], name: str) -> None:
    bundle, read, _ = exported[name]
    assert (read["eos"], read["pad"]) == (bundle.tokenizer.end_id, bundle.tokenizer.pad_id)
    assert (read["max_length"], read["dtype"]) == (bundle.max_length, "torch.float32")
    can_be_sampled = bundle.model.unsayable == 0
    checked = 0
    for conversation, row in zip(CONVERSATIONS, read["rows"], strict=True):
        ids = prompt_of(bundle, conversation)
        assert row["ids"] == ids
        if len(ids) + NEW_TOKENS > bundle.max_length:  # not possible in rlchat
            continue
        ours, theirs = logits_of(bundle, ids), torch.tensor(row["logits"])
        assert torch.allclose(ours[:, can_be_sampled], theirs[:, can_be_sampled], atol=1e-4, rtol=1e-5)
        assert row["reply"] == greedy(bundle, ids)
        checked += 1
    assert checked >= 2


def test_the_models_of_this_file_differ_in_what_they_say(exported: dict[str, Any]) -> None:
    """Equal responses of models that always repeat one token would prove little."""
    replies = [row["reply"] for name in SHAPES for row in exported[name][1]["rows"]]
    assert len({tuple(reply) for reply in replies}) == len(replies)
    assert max(len(set(reply)) for reply in replies) > 3


def test_the_files_of_a_folder(exported: dict[str, Any]) -> None:
    bundle, _, folder = exported["llama"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == bundle.tokenizer.vocab_size
    assert config["tie_word_embeddings"] is False
    assert (config["eos_token_id"], config["pad_token_id"]) == (bundle.tokenizer.end_id, bundle.tokenizer.pad_id)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == bundle.tokenizer.unsayable_ids
    assert generation["eos_token_id"] == bundle.tokenizer.end_id
    assert (folder / "README.md").read_text() == "A card."


def test_a_folder_can_be_a_base_model(exported: dict[str, Any], tokenizer: ChatTokenizer) -> None:
    """The layers arrive unchanged: the exported folder has the names that transformers expects."""
    bundle, _, folder = exported["llama"]
    loaded = Backbone(str(folder), tokenizer.vocab_size, 64)
    for name, weight in bundle.model.backbone.transformer.layers.state_dict().items():
        assert torch.equal(loaded.transformer.layers.state_dict()[name], weight)


def test_half_precision(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    write_folder(random_bundle("llama", tokenizer), tmp_path / "half", "", torch.bfloat16)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_safetensors_have_the_tensors_of_the_model_file(tmp_path: Path) -> None:
    bundle = load_policy(OLD_MODEL)
    write_safetensors(bundle, tmp_path / "model.safetensors")
    tensors, expected = load_file(tmp_path / "model.safetensors"), bundle.model.state_dict()
    assert tensors.keys() == expected.keys()
    assert "value_head.weight" in tensors
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_an_encoder_made_causal_is_refused(byte_tokenizer: ChatTokenizer) -> None:
    shape = {"model_type": "distilbert", "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    backbone = Backbone(shape, byte_tokenizer.vocab_size, 16)
    bundle = PolicyBundle(new_policy(backbone, byte_tokenizer), byte_tokenizer, 16)
    with pytest.raises(
        UserError, match=r"distilbert is an encoder that rlchat runs with causal attention.*safetensors"
    ):
        causal_lm(bundle)


def test_other_logits_are_refused(monkeypatch: pytest.MonkeyPatch, byte_tokenizer: ChatTokenizer) -> None:
    bundle = random_bundle("llama", byte_tokenizer)
    real = bundle.model.logits
    monkeypatch.setattr(bundle.model, "logits", lambda hidden: real(hidden) * 1.01)
    with pytest.raises(UserError, match=r"class of llama in transformers computes logits that differ by"):
        causal_lm(bundle)


@pytest.mark.parametrize("name", SHAPES)
def test_the_names_in_a_folder_are_those_of_the_weights(name: str, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    bundle = random_bundle(name, tokenizer)
    model = causal_lm(bundle)
    save_model(model, tmp_path, torch.float32)
    ours, stored = bundle.model.backbone.state_dict(), load_file(tmp_path / "model.safetensors")
    names = saved_names(bundle.model.backbone, model, tmp_path)
    assert set(names.values()) == stored.keys()
    assert all(torch.equal(ours[key], stored[names[key]]) for key in names)
    save_file({"experts.0.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(
        UserError, match=r"models contain experts\.0\.weight, which the model in memory does not have in"
    ):
        saved_names(bundle.model.backbone, model, tmp_path)


def test_a_failed_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: ChatTokenizer
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_folder(random_bundle("llama", byte_tokenizer), tmp_path / "out", "")
    assert list(tmp_path.iterdir()) == []
