"""`HFReward` on a small random BERT classifier and a small Llama classifier, each with a tokenizer made here."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.small_classifier import SPECIAL, WORDS, save_bert, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.rewards import Factor, FactorError, HFReward, LearnedQuality, Reply, Reward
from rlchat.rewards.classifier import shortened

TEMPLATE = "{% for m in messages %}[CLS]{{ m.role }} : {{ m.content }}[SEP]{% endfor %}"


def ask(*texts: str) -> Conversation:
    roles = ["assistant", "user"]
    return Conversation(tuple(Message(roles[(len(texts) - i) % 2], text) for i, text in enumerate(texts)))  # type: ignore[arg-type]


def replies(*texts: str) -> list[Reply]:
    return [Reply(text, 3, True) for text in texts]


def expected(folder: str, ids: list[int], types: list[int]) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0]


def test_the_logit_of_a_pair(tmp_path: Path) -> None:
    word_tokenizer(tmp_path)
    folder = save_bert(tmp_path)
    factor = HFReward(folder, weight=0.5, batch_size=2)
    assert factor._loaded is None
    prompts = [ask("a b"), ask("a"), ask("a", "b", "c")]
    found = Reward([factor]).breakdown(prompts, replies("c", "d e f", ""))["hf_reward"]
    a, b, c, d, e, f = range(4, 10)
    rows = [([2, a, b, 3, c, 3], [0] * 4 + [1] * 2), ([2, a, 3, d, e, f, 3], [0] * 3 + [1] * 4)]
    rows += [([2, a, b, c, 3, 3], [0] * 5 + [1])]
    assert found.tolist() == pytest.approx([0.5 * expected(folder, *row).item() for row in rows], abs=1e-6)
    assert len(set(found.tolist())) == 3
    assert factor([], []).shape == (0,)
    assert HFReward(**factor.describe()["init_args"]).describe() == factor.describe()


@pytest.mark.parametrize("kind", [HFReward, LearnedQuality])
def test_a_device_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch, kind: type[Factor]) -> None:
    def no_gpu(*_: object, device: str) -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr("rlchat.utils.devices.torch.empty", no_gpu)
    with pytest.raises(FactorError) as error:
        kind("model", device="cuda")  # type: ignore[call-arg]
    name = "hf_reward" if kind is HFReward else "learned_quality"
    assert str(error.value) == (
        f"reward factor '{name}': device 'cuda' is not available on this machine; use another, for example cpu, or "
        "auto for that of the policy"
    )


def test_a_model_without_the_files_of_its_tokenizer(tmp_path: Path) -> None:
    """transformers makes a tokenizer of special tokens only, to which every word is unknown."""
    with pytest.raises(FactorError, match="comes without a vocabulary; add the files of its tokenizer"):
        Reward([HFReward(save_bert(tmp_path))]).breakdown([ask("a")], replies("b"))


def test_in_bf16_training_the_score_is_the_same(tmp_path: Path) -> None:
    word_tokenizer(tmp_path)
    factor = HFReward(save_bert(tmp_path))
    alone = factor([ask("a")], replies("b"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(factor([ask("a")], replies("b")), alone)


def test_a_label_of_several_and_the_response_alone(tmp_path: Path) -> None:
    word_tokenizer(tmp_path)
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    folder = save_bert(tmp_path, 3, **names)
    logits = expected(folder, [2, 5, 3], [0] * 3)
    score = {
        label: HFReward(folder, text="response", label=label)([ask("a")], replies("b")).item()
        for label in ("good", 0, "1")
    }
    chances = logits.softmax(0).tolist()
    assert score == pytest.approx({"good": chances[2], 0: chances[0], "1": chances[1]}, abs=1e-6)
    raw = HFReward(folder, text="response", label="good", output="logit", clip=0.01)([ask("a")], replies("b")).item()
    assert raw == pytest.approx(min(0.01, max(-0.01, logits[2].item())))
    with pytest.raises(
        FactorError, match=r"'hf_reward': label is not set: expected one of the labels of .*: 0 \(bad\), 1"
    ):
        HFReward(folder)([ask("a")], replies("b"))
    with pytest.raises(FactorError, match="'mood': invalid value 'great' for label"):
        HFReward(folder, label="great", name="mood")([ask("a")], replies("b"))


def test_the_probability_of_one_label_and_a_chat_template(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, TEMPLATE)
    folder = save_bert(tmp_path)
    found = HFReward(folder, output="probability")([ask("a")], replies("b"))
    user, assistant, colon = (
        (SPECIAL + WORDS).index("user"),
        (SPECIAL + WORDS).index("assistant"),
        len(SPECIAL + WORDS) - 1,
    )
    ids = [2, user, colon, 4, 3, 2, assistant, colon, 5, 3]
    assert found.item() == pytest.approx(expected(folder, ids, [0] * len(ids)).sigmoid().item(), abs=1e-6)


def test_no_response_can_hold_a_control_token(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path, TEMPLATE)
    factor = HFReward(save_bert(tmp_path))
    encoded, _ = factor._row(factor._classifier(), ask("a"), Reply("[SEP][CLS]b[S[SEP]EP]", 3, True))
    assert encoded["input_ids"].count(tokenizer.sep_token_id) == 2  # those of the template
    assert encoded["input_ids"].count(tokenizer.cls_token_id) == 2


def test_truncation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The oldest messages go first, then the beginning of the last user message, then the end of the response."""
    word_tokenizer(tmp_path)
    folder = save_bert(tmp_path)
    with caplog.at_level(logging.WARNING, "rlchat"):
        factor = HFReward(folder, max_length=8)
        a, b, c, d, e, f = range(4, 10)
        classifier = factor._classifier()

        def ids(prompt: Conversation, response: str) -> list[int]:
            return factor._row(classifier, prompt, Reply(response, 1, True))[0]["input_ids"]

        assert ids(ask("a", "b", "c"), "d e") == [2, a, b, c, 3, d, e, 3]  # fits exactly
        assert ids(ask("a", "b", "c"), "d e f") == [2, c, 3, d, e, f, 3]
        kept = ids(ask("a b c d e f"), "d e")
        assert len(kept) <= 8
        assert kept[-4:] == [3, d, e, 3]
        assert kept[1:-4] == [a, b, c, d, e, f][-len(kept[1:-4]) :]
        kept = ids(ask("a"), "a b c d e f a b c d e f")
        assert len(kept) <= 8
        assert kept[:2] == [2, 3]
        assert kept[2:-1] == [a, b, c, d, e, f][: len(kept[2:-1])]
        factor([ask("a"), ask("a")], replies("b", "a b c d e f a"))
    assert caplog.messages == [
        f"reward factor 'hf_reward': 1 of 2 responses exceed max_length 8 of {folder} with their prompts and were cut"
    ]
    with pytest.raises(FactorError, match="max_length 2 leaves no room for text"):
        HFReward(folder, max_length=2)([ask("a")], replies("b"))
    with pytest.raises(FactorError, match="max_length 99 is more than the 24 tokens of model"):
        HFReward(folder, max_length=99)([ask("a")], replies("b"))


def test_what_is_removed_next() -> None:
    turns = [{"role": role, "content": role[0] * 4} for role in ("system", "user", "assistant", "user")]
    without_oldest = [turns[0], turns[3]]
    assert shortened(turns, "rr", 0.1) == (without_oldest, "rr")
    assert shortened(without_oldest, "rr", 0.1) == ([turns[3]], "rr")
    assert shortened([turns[3]], "rr", 0.3) == ([{"role": "user", "content": "uu"}], "rr")  # ⌈6 × 0.3⌉ characters
    assert shortened([{"role": "user", "content": ""}], "rr", 0.3) == ([{"role": "user", "content": ""}], "r")
    assert shortened([turns[3]], "rr", 0.3, with_prompt=False) == ([turns[3]], "r")
    assert shortened([{"role": "user", "content": ""}], "", 0.3) is None


def test_a_decoder_without_a_token_for_padding(tmp_path: Path) -> None:
    """Scores do not depend on the rows beside them."""
    tokenizer = word_tokenizer(tmp_path, inputs=("input_ids", "attention_mask"))
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS), num_labels=1, initializer_range=0.5, pad_token_id=None, **sizes
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    factor = HFReward(str(tmp_path))
    prompts, texts = [ask("a"), ask("b c d")], replies("b", "c d e")
    together = factor(prompts, texts)
    alone = [factor([prompt], [text]).item() for prompt, text in zip(prompts, texts, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert alone[0] != pytest.approx(alone[1], abs=1e-4)


def test_a_model_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        FactorError, match=r"'hf_reward': model .*empty: the folder holds no model and tokenizer that tran"
    ):
        HFReward(str(empty))([ask("a")], replies("b"))
    with pytest.raises(
        FactorError, match="model no/such-model-here: it is neither a folder nor a model that could be do"
    ):
        HFReward("no/such-model-here")([ask("a")], replies("b"))
    headless = tmp_path / "headless"
    word_tokenizer(headless)
    BertModel(BertConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        headless
    )
    with pytest.raises(
        FactorError, match=r"has no trained classification head: classifier\.bias, classifier\.weight mis"
    ):
        HFReward(str(headless))([ask("a")], replies("b"))
    save_bert(headless)
    with pytest.raises(FactorError, match="its tokenizer has no chat template; set text to pair or response"):
        HFReward(str(headless), text="chat")([ask("a")], replies("b"))
    word_tokenizer(headless, "{{ raise_exception('no system message') }}")
    with pytest.raises(FactorError, match=r"refuses the conversation \(no system message\); set text to pair"):
        HFReward(str(headless))([ask("a")], replies("b"))


def test_options_that_cannot_work() -> None:
    for options, complaint in (
        ({"clip": 0}, "for clip"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_l"),
    ):
        with pytest.raises(UserError, match=complaint):
            HFReward("model", **options)  # type: ignore[arg-type]


def test_the_model_follows_the_policy() -> None:
    factor, fixed = HFReward("model"), HFReward("model", device="cpu")
    for each in (factor, fixed):
        each.to(torch.device("meta"))
    assert (factor._device.type, fixed._device.type) == ("meta", "cpu")
    assert json.dumps(factor.describe())
