"""`rlchat export --to peft`: peft and transformers compute what rlchat computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapters import IDS, base_folder, outputs, ppo_with_adapter, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlchat.__main__ import main
from rlchat.conversation import Conversation, Message
from rlchat.export.adapter import FILES
from rlchat.models.model_file import load_policy


def export(model: Path, output: Path, *options: str) -> int:
    return main(["export", str(model), "--to", "peft", str(output), *options])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base_folder(tmp_path_factory.mktemp("bases") / "base")


def test_transformers_loads_the_adapter_with_its_base(tmp_path: Path, base: str) -> None:
    adapter = save(ppo_with_adapter(base_model=base), tmp_path / "adapter.pt")
    assert export(adapter, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    bundle = load_policy(adapter)
    ours = outputs(bundle)[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    said = (bundle.model.unsayable == 0).nonzero().squeeze(1)  # the base has rows that no token uses
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits[..., said], ours[..., said], atol=1e-5, rtol=1e-5)
        assert (plain(IDS).logits[..., said] - ours[..., said]).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True
    )
    assert found["input_ids"] == bundle.tokenizer.render_prompt(Conversation((Message("user", "Hello"),))).ids


@pytest.mark.parametrize("case", ["merged", "on a model file", "another tokenizer"])
def test_what_peft_cannot_load_is_refused(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    if case == "merged":
        model = save(ppo_with_adapter(base_model=base), tmp_path / "model.pt", merge_adapter=True)
        expected = "contains no adapter"
    elif case == "on a model file":
        start = save(ppo_with_adapter(base_model=base), tmp_path / "start.pt", merge_adapter=True)
        model = save(ppo_with_adapter(init_from=str(start)), tmp_path / "model.pt")
        expected = "belongs to the model file"
    else:
        model = save(ppo_with_adapter(base_model=base, tiktoken_encoding="rlchat_1k"), tmp_path / "model.pt")
        expected = "does not fit the base's embedding"
    assert export(model, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "--to hf" in error
    assert not (tmp_path / "out").exists()
