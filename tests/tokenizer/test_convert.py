"""Hugging Face tokenizers under tiktoken: equal ids, or a refusal that names the reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_tokenizers import LLAMA3, QWEN, reference, tokenizer_folder, tokenizer_json

from rlchat.cli.tokenizer import main
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.convert import convert
from rlchat.tokenizer.load import sidecar
from rlchat.tokenizer.pattern import NotExact

PIECES = (
    *(
        "12345",
        "1",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " \n",
        "don't",
        "IT'S",
        "'ſ",
        "'K",
        "héllo",
        "e\u0301",
        "你好",
        "🙂",
    ),
    *(
        "\u00a0",
        "\u3000",
        "...",
        "a",
        " the",
        "x_y",
        "\x85",
        "\u2028",
        "١٢٣٤",
        "²",
        "they're",
        "<|im_end|>",
        "\x00",
        "ﬁ",
    ),
)
DIGITS = {"type": "Digits", "individual_digits": True}


def made_texts(count: int = 3000) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choice(PIECES) for _ in range(draw.randint(1, 12))) for _ in range(count)]


def single_digits(raw: dict[str, Any]) -> dict[str, Any]:
    raw["pre_tokenizer"]["pretokenizers"].insert(0, DIGITS)
    return raw


@pytest.mark.parametrize(
    "raw",
    [
        tokenizer_json(None),
        single_digits(tokenizer_json(None)),
        tokenizer_json(LLAMA3),
        tokenizer_json(QWEN, normalizer="NFC"),
        tokenizer_json(QWEN, text=("<think>", "</think>", "<th"), normalizer="NFC"),
        tokenizer_json(r"\p{L}+|\s+"),  # leaves gaps, which are pieces too
    ],
    ids=["gpt2", "smollm2", "llama3", "qwen", "text tokens", "gaps"],
)
def test_ids_equal_those_of_the_base_tokenizer(raw: dict[str, Any]) -> None:
    ours, theirs = convert(raw, "own").encoding, reference(raw)
    for text in [*made_texts(), "a<think>b</think>", "<thin<think>"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_added_tokens_that_are_text_can_be_said_and_control_tokens_cannot(tmp_path: Path) -> None:
    raw = tokenizer_json(QWEN, text=("<think>",))
    tokenizer = ChatTokenizer(str(tokenizer_folder(tmp_path, raw)))
    (thought,) = tokenizer.encode("<think>")
    assert tokenizer.decode([thought]) == "<think>"
    assert thought not in tokenizer.special_ids
    assert thought not in tokenizer.unsayable_ids
    assert not tokenizer.special_ids.intersection(tokenizer.encode("<|im_start|><|im_end|><|endoftext|>"))


def test_a_text_token_that_is_matched_after_normalization(tmp_path: Path) -> None:
    raw = tokenizer_json(QWEN, text=("<a>",), normalizer="NFC")
    for normalized, expected in ((False, 1), (True, 0)):  # > and U+0338 compose
        raw["added_tokens"][-1]["normalized"] = normalized
        ours, theirs = convert(raw, "own").encoding, reference(raw)
        ids = ours.encode("x<a>\u0338")
        assert ids == theirs.encode("x<a>\u0338", add_special_tokens=False).ids
        assert ids.count(raw["added_tokens"][-1]["id"]) == expected


def test_bytes_without_a_token_get_ids_that_no_response_contains() -> None:
    raw = tokenizer_json(LLAMA3)
    vocabulary = raw["model"]["vocab"]
    for letter in ("Ā", "ā"):  # the bytes 0 and 1
        del vocabulary[letter]
    conversion = convert(raw, "own")
    size = max(vocabulary.values()) + 1 + 3  # three special tokens follow
    assert conversion.missing_bytes == (0, 1)
    assert conversion.encoding.unused == (size, size + 1)
    assert conversion.encoding.encode("a\x01") == [vocabulary["a"], size + 1]
    tokenizer = ChatTokenizer.of(conversion.encoding)
    assert tokenizer.decode(tokenizer.encode("a\x00b")) == "a\x00b"
    assert {size, size + 1} <= set(tokenizer.unsayable_ids)


def test_a_token_inside_the_range_may_be_special() -> None:
    raw = tokenizer_json(LLAMA3)
    vocabulary = raw["model"]["vocab"]
    raw["model"]["vocab"] = {token: number + 3 for token, number in vocabulary.items()}
    for number, token in enumerate(raw["added_tokens"]):  # as in SmolLM2: 0, 1, 2, and in the vocabulary too
        token["id"] = number
        raw["model"]["vocab"][token["content"]] = number
    conversion = convert(raw, "own")
    assert conversion.encoding.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    theirs = reference(raw)
    for text in made_texts(500):
        assert conversion.encoding.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_ids_out_of_the_order_of_merges_are_permuted() -> None:
    raw = tokenizer_json(LLAMA3)
    vocabulary = raw["model"]["vocab"]
    ids = list(vocabulary.values())
    random.Random(1).shuffle(ids)
    raw["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
    conversion, theirs = convert(raw, "own"), reference(raw)
    assert len(conversion.moved) > 100
    assert sorted(conversion.moved) == sorted(conversion.moved.values())
    for text in made_texts(1000):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert conversion.encoding.encode(text) == [conversion.moved.get(token, token) for token in expected]


def test_a_token_that_no_merge_makes_is_left_out() -> None:
    raw = tokenizer_json(LLAMA3)
    raw["model"]["vocab"]["Ġxyzzy"] = 500
    conversion, theirs = convert(raw, "own"), reference(raw)
    assert conversion.unreachable == ("Ġxyzzy",)
    assert conversion.encoding.encode(" xyzzy") == theirs.encode(" xyzzy").ids != [500]


def test_with_ignore_merges_such_a_token_is_a_whole_piece() -> None:
    raw = tokenizer_json(LLAMA3)
    raw["model"]["vocab"]["Ġxyzzy"] = 500
    raw["model"]["ignore_merges"] = True
    ours, theirs = convert(raw, "own").encoding, reference(raw)
    assert ours.encode(" xyzzy") == [500]
    for text in (" xyzzy", " xyzzyx", "a xyzzy xyzzy!", "xyzzy"):
        assert ours.encode(text) == theirs.encode(text).ids


def test_several_merges_of_one_token_with_others_between() -> None:
    """``abc`` is listed as a+bc and, much later, as ab+c; only ab+c can happen, since ab is merged first."""
    raw = tokenizer_json(LLAMA3)
    vocabulary, merges = raw["model"]["vocab"], raw["model"]["merges"]
    letters = {token: number for token, number in vocabulary.items() if len(token) == 1}
    order = ["ab", "bc", "abc", "xy", "xyz"]
    raw["model"]["vocab"] = {**letters, **{token: 300 + number for number, token in enumerate(order)}}
    merges[:] = [["a", "b"], ["b", "c"], ["a", "bc"], ["x", "y"], ["xy", "z"], ["ab", "c"]]
    conversion, theirs = convert(raw, "own"), reference(raw)
    assert conversion.moved == {302: 304, 303: 302, 304: 303}
    for text in ("abc", "abcxyz", "xyzabc", "aabcc", "bcabc"):
        assert conversion.encoding.encode(text) == [conversion.moved.get(i, i) for i in theirs.encode(text).ids]


def pre_tokenizer(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw.update(pre_tokenizer=values)


def split(regex: str) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": regex})


def two_splits(raw: dict[str, Any]) -> None:
    raw["pre_tokenizer"]["pretokenizers"].insert(0, raw["pre_tokenizer"]["pretokenizers"][0])


def two_tokens_without_a_merge(raw: dict[str, Any]) -> None:
    raw["model"]["vocab"].update({"Ġxq": 500})
    raw["model"]["ignore_merges"] = True
    raw["model"]["vocab"]["Ġx"] = 501
    raw["model"]["merges"].append(["Ġ", "x"])


def reachable_special(raw: dict[str, Any]) -> None:
    raw["added_tokens"][0].update(content="Ġthe", id=raw["model"]["vocab"]["Ġthe"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: raw["model"].update(byte_fallback=True), "merges characters and not bytes .byte_fallback"),
        (lambda raw: raw["model"].update(type="WordPiece"), "a WordPiece model"),
        (lambda raw: raw["model"].update(type="Unigram"), "a Unigram model"),
        (lambda raw: raw["model"].update(dropout=0.1), "uses dropout 0.1"),
        (pre_tokenizer(type="Metaspace", replacement="▁", prepend_scheme="first"), "Metaspace.* not byte-level"),
        (pre_tokenizer(type="ByteLevel", add_prefix_space=True, use_regex=True), "adds a space before every text"),
        (two_splits, r"\(Split \+ Split \+ ByteLevel"),
        (lambda raw: raw.update(normalizer={"type": "NFKC"}), "normalizer NFKC"),
        (split(LLAMA3.replace("{1,3}", "{1,3}+")), r"\{1,3\}\+.* tiktoken reads differently"),
        (split(r"\s+$|" + LLAMA3), r"has \"\$"),
        (split(r"\A\s|" + LLAMA3), r"\\\\A"),
        (split(LLAMA3 + r"|\z"), r"\\\\z"),
        (split(r"\p{L}*"), "can match the empty text"),
        (two_tokens_without_a_merge, "no merge although two tokens make them up, such as 'Ġxq'"),
        (reachable_special, "gives the special token 'Ġthe' through merges"),
        (lambda raw: raw["added_tokens"][0].update(special=False, rstrip=True), "depends on the text around it"),
        (lambda raw: raw["model"]["vocab"].update({"▁a": 500}), "1 tokens are not spelled in bytes, such as '▁a'"),
        (lambda raw: (raw["model"]["vocab"].pop("Ā"), raw["model"].update(unk_token="a")), "1 of the 256 bytes"),
    ],
)
def test_what_tiktoken_cannot_reproduce_is_refused(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    raw = tokenizer_json(LLAMA3)
    change(raw)
    with pytest.raises(NotExact, match=reason):
        convert(raw, "own")


def test_a_refusal_says_what_would_follow(tmp_path: Path) -> None:
    raw = tokenizer_json(LLAMA3)
    raw["normalizer"] = {"type": "NFKC"}
    with pytest.raises(UserError, match=r"NFKC.*Set --model.tiktoken_encoding cl100k_base.*start from the pieces"):
        ChatTokenizer(str(tokenizer_folder(tmp_path, raw)))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no tokenizer.json; pass a folder that holds one"):
        ChatTokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    for attempt in (lambda: ChatTokenizer(str(tmp_path)), lambda: main(["convert", str(tmp_path), "-o", "o.tiktoken"])):
        with pytest.raises(UserError, match=r"WordPiece.* (is|only) .*byte-level BPE"):
            attempt()


def test_the_command_suggests_its_own_options(tmp_path: Path) -> None:
    raw, output = tokenizer_json(LLAMA3), tmp_path / "own.tiktoken"
    words = [
        "convert",
        str(tokenizer_folder(tmp_path / "base", raw, "{{ messages[-1]['content'] }}")),
        "-o",
        str(output),
    ]
    with pytest.raises(UserError, match=r"Leave the template out with --no-chat-format$"):
        main(words)
    assert main([*words, "--no-chat-format"]) == 0
    output.unlink()
    tokenizer_folder(tmp_path / "base", {**raw, "normalizer": {"type": "NFKC"}})
    with pytest.raises(UserError, match=r"NFKC[^-]*make a rank file with `rlchat tokenizer train`$"):
        main(words)


def test_a_converted_file_is_the_same_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tokenizer_folder(tmp_path / "model", tokenizer_json(QWEN, text=("<think>",), normalizer="NFC"))
    file = tmp_path / "own.tiktoken"
    assert main(["convert", str(folder), "-o", str(file)]) == 0
    assert "1 added tokens that are text, text is normalized to NFC; the model's own chat" in capsys.readouterr().out
    converted = ChatTokenizer(str(file))
    assert converted.state() == ChatTokenizer(str(folder)).state()
    theirs = reference(tokenizer_json(QWEN, text=("<think>",)))
    assert converted.encode("e\u0301<think>12") == theirs.encode("é<think>12").ids
    with pytest.raises(UserError, match="already exists"):
        main(["convert", str(folder), "-o", str(file)])


def test_a_rank_file_carries_its_pattern(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "model", tokenizer_json(QWEN), None)
    main(["convert", str(folder), "-o", str(tmp_path / "own.tiktoken")])
    assert ChatTokenizer(str(tmp_path / "own.tiktoken")).state()["pattern"] == QWEN
    sidecar(tmp_path / "own.tiktoken").write_text("{}")
    with pytest.raises(UserError, match=r"own.tiktoken.json: cannot be read .KeyError: 'pattern'"):
        ChatTokenizer(str(tmp_path / "own.tiktoken"))


def test_training_a_rank_file_removes_an_old_sidecar(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "model", tokenizer_json(QWEN), None)
    file, data = tmp_path / "own.tiktoken", tmp_path / "text.txt"
    data.write_text("some text that is trained on")
    main(["convert", str(folder), "-o", str(file)])
    main(["train", str(data), "--vocab-size", "260", "-o", str(file), "--force"])
    assert not sidecar(file).exists()
    assert ChatTokenizer(str(file)).base_size == 260
