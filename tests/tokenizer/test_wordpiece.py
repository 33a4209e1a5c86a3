"""WordPiece tokens for the tokens of another encoding, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.hf_tokenizers import wordpiece_json

from rlchat.tokenizer.base_files import TokenizerFiles
from rlchat.tokenizer.base_vocabulary import BaseVocabulary

WORDS = ("at", "ing", "hello", "a", ",", ".", "...", "71", "the", "cafe", "\u4e2d")
INSIDE = ("##ation", "##al", "##ional", "##ing", "##hell", "##o", "##a", "##,", "##71", "##the", "##\u4e2d")


def vocabulary(**more: Any) -> tuple[BaseVocabulary, dict[str, int]]:
    raw = {**wordpiece_json((*WORDS, *INSIDE)), **more}
    return BaseVocabulary(TokenizerFiles("base", raw, {}, None)), raw["model"]["vocab"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "the"),
        (" The", "the"),  # lower-cased
        ("the", "##the"),  # as in `` ba`` + ``the``
        ("The", "the"),  # a capital letter begins a word
        ("ing", "##ing"),
        ("ational", "##ation ##al"),  # not at ##ional
        ("hello", "hello"),  # one piece, and not the two of ##hell ##o
        ("71", "71"),  # encodings separate a number from the space before it
        (" Caf\u00e9", "cafe"),  # without accents
        (",", ","),  # the base tokenizer splits off punctuation, so ##, is never trained
        (" ,", ","),
        (" ...", ". . ."),
        ("\u4e2d", "\u4e2d"),  # and Chinese characters
        ("a,the", "##a , the"),
        ("\n", ""),
        ("xyz", ""),
        ("a[SEP]", "##a"),  # typed text, never the control token
    ],
)
@pytest.mark.parametrize("padding", [False, True])
def test_the_pieces_of_a_token(text: str, expected: str, padding: bool) -> None:
    fixed = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    fixed |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    base, ids = vocabulary(**({"padding": fixed} if padding else {}))
    assert base.pieces(text.encode()) == tuple(ids[piece] for piece in expected.split())


def test_bytes_that_are_no_text_have_no_pieces() -> None:
    assert vocabulary()[0].pieces(b"\xe4\xb8") == ()


def test_only_tokens_that_a_text_can_give_are_matched_by_bytes() -> None:
    base, ids = vocabulary()
    found = {text.decode(): number for text, number in base.by_bytes.items()}
    both = ("at", "hello", "71", "cafe", ",", ".", "\u4e2d")
    words = {**{f" {word}": word for word in (*both, "ing", "a", "the")}, **{word: word for word in both}}
    inside = {piece.removeprefix("##"): piece for piece in INSIDE if piece not in ("##,", "##71", "##\u4e2d")}
    assert found == {text: ids[piece] for text, piece in (words | inside).items()}
