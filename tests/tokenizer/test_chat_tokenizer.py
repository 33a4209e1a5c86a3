"""ChatTokenizer: conversations as ids, truncation, and rank files."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from rlchat.conversation import Conversation, Message, Role
from rlchat.errors import UserError
from rlchat.tokenizer.chat_format import MARKERS
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.load import packaged_encodings
from rlchat.tokenizer.ranks import format_ranks, parse_ranks, train_ranks

PAD, SYSTEM, USER, ASSISTANT, END = range(256, 261)  # of byte_tokenizer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
with_markers = st.lists(st.one_of(texts, st.sampled_from([*MARKERS, "<|endoftext|>"])), max_size=5).map("".join)
roles: st.SearchStrategy[Role] = st.sampled_from(["system", "user", "assistant"])
conversations = st.lists(st.builds(Message, roles, with_markers), min_size=1, max_size=6).map(
    lambda messages: Conversation(tuple(messages))
)


def talk(*said: str) -> Conversation:
    """``s:``, ``u:`` or ``a:`` and the text of each message."""
    names: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
    return Conversation(tuple(Message(names[line[0]], line[2:]) for line in said))


def shown(ids: list[int]) -> str:
    """Ids of byte_tokenizer in letters: ``S(``, ``U(``, ``A(`` for the markers that open a turn, ``)`` for its end."""
    markers = {SYSTEM: "S(", USER: "U(", ASSISTANT: "A(", END: ")"}
    return "".join(markers.get(token) or chr(token) for token in ids)


# -- text --


@given(text=with_markers)
@settings(deadline=None)
def test_any_text_survives_encoding_and_decoding(tokenizer: ChatTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids.intersection(ids)


@given(text=with_markers)
@settings(deadline=None)
def test_typed_markers_are_encoded_as_text(byte_tokenizer: ChatTokenizer, text: str) -> None:
    rendered = byte_tokenizer.render(Conversation((Message("user", text),)))
    assert rendered.ids == [USER, *text.encode(), END]


def test_half_a_surrogate_pair_is_replaced(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_ids_of_markers_follow_those_of_the_encoding(byte_tokenizer: ChatTokenizer) -> None:
    assert (byte_tokenizer.base_size, byte_tokenizer.vocab_size) == (256, 261)
    assert (byte_tokenizer.pad_id, byte_tokenizer.end_id) == (PAD, END)
    assert byte_tokenizer.special_ids == {PAD, SYSTEM, USER, ASSISTANT, END}
    assert byte_tokenizer.unsayable_ids == [PAD, SYSTEM, USER, ASSISTANT]
    assert byte_tokenizer.decode([USER, 72, PAD, 105, END]) == "Hi"


def test_digits_stay_single_in_the_packaged_encoding() -> None:
    tokenizer = ChatTokenizer("rlchat_1k")
    assert [tokenizer.decode([token]) for token in tokenizer.encode("12345")] == list("12345")


# -- streaming --


@given(data=st.data())
@settings(deadline=None)
def test_streaming_equals_decoding(tokenizer: ChatTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


@given(text=texts)
@settings(deadline=None)
def test_streaming_never_yields_half_a_character(byte_tokenizer: ChatTokenizer, text: str) -> None:
    stream = byte_tokenizer.stream()
    pieces = [stream.push(token) for token in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.finish() == ""


def test_a_character_is_yielded_with_its_last_byte(byte_tokenizer: ChatTokenizer) -> None:
    stream = byte_tokenizer.stream()
    assert [stream.push(token) for token in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert [stream.push(0xF0), stream.push(0x9F), stream.finish()] == ["", "", "\ufffd"]


# -- conversations --


def test_rendering_and_the_loss_mask(byte_tokenizer: ChatTokenizer) -> None:
    rendered = byte_tokenizer.render(talk("s:x", "u:ab", "a:cd", "u:e"))
    assert rendered.ids == [257, 120, 260, 258, 97, 98, 260, 259, 99, 100, 260, 258, 101, 260]
    assert rendered.loss_mask == [False] * 8 + [True] * 3 + [False] * 3
    assert (rendered.dropped, rendered.cut) == (0, 0)


def test_a_prompt_opens_the_turn_of_the_assistant(byte_tokenizer: ChatTokenizer) -> None:
    rendered = byte_tokenizer.render_prompt(talk("u:ab", "a:c", "u:d"))
    assert shown(rendered.ids) == "U(ab)A(c)U(d)A("
    assert rendered.loss_mask == [False] * 5 + [True] * 2 + [False] * 4
    assert byte_tokenizer.render_prompt(Conversation(())).ids == [ASSISTANT]


LONG = talk("s:SYS", "u:ab", "a:cd", "u:ef", "a:gh", "u:ij")  # a message has its text and two markers: 5, then 4 each


@pytest.mark.parametrize(
    ("max_length", "expected", "dropped", "cut"),
    [
        (26, "S(SYS)U(ab)A(cd)U(ef)A(gh)U(ij)A(", 0, 0),
        (25, "S(SYS)U(ef)A(gh)U(ij)A(", 2, 0),
        (18, "S(SYS)U(ef)A(gh)U(ij)A(", 2, 0),
        (17, "S(SYS)U(ij)A(", 4, 0),
        (10, "S(SYS)U(ij)A(", 4, 0),
        (9, "U(ij)A(", 5, 0),  # the system message stays as long as it fits
        (5, "U(ij)A(", 5, 0),
        (4, "U(j)A(", 5, 1),
        (3, "U()A(", 5, 2),
        (2, "U(A(", 5, 3),
        (1, "A(", 5, 4),
    ],
)
def test_prompts_that_are_too_long(
    byte_tokenizer: ChatTokenizer, max_length: int, expected: str, dropped: int, cut: int
) -> None:
    rendered = byte_tokenizer.render_prompt(LONG, max_length)
    assert (shown(rendered.ids), rendered.dropped, rendered.cut) == (expected, dropped, cut)


def test_a_system_message_that_is_too_long_does_not_displace_other_messages(byte_tokenizer: ChatTokenizer) -> None:
    rendered = byte_tokenizer.render_prompt(talk("s:0123456789", "u:ab", "a:cd", "u:ef"), 13)
    assert (shown(rendered.ids), rendered.dropped) == ("U(ab)A(cd)U(ef)A(", 1)


@pytest.mark.parametrize(
    ("max_length", "expected", "dropped", "cut"),
    [
        (16, "U(ab)A(cd)U(ef)A(gh)", 0, 0),
        (15, "U(ef)A(gh)", 2, 0),
        (8, "U(ef)A(gh)", 2, 0),
        (7, "U(f)A(gh)", 2, 1),  # the question loses tokens from the left, down to half of the room …
        (6, "U(f)A(gh", 2, 2),  # … and then the response from the right; its end marker then has no loss
        (5, "U()A(gh", 2, 3),
        (4, "U()A(g", 2, 4),
        (3, "U(A(g", 2, 5),
        (2, "U(A(", 2, 6),
        (1, "A(", 2, 7),
        (0, "", 2, 8),
    ],
)
def test_training_conversations_that_are_too_long(
    byte_tokenizer: ChatTokenizer, max_length: int, expected: str, dropped: int, cut: int
) -> None:
    rendered = byte_tokenizer.render(talk("u:ab", "a:cd", "u:ef", "a:gh"), max_length)
    assert (shown(rendered.ids), rendered.dropped, rendered.cut) == (expected, dropped, cut)


def test_the_mask_of_a_truncated_conversation(byte_tokenizer: ChatTokenizer) -> None:
    assert byte_tokenizer.render(talk("u:ab", "a:cd"), 6).loss_mask == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("conversation", "max_length", "expected"),
    [
        (talk("a:abcdef"), 5, "A(abcd"),  # a response without a prompt loses its end
        (talk("u:abcdef"), 5, "U(def)"),  # a question without a response loses its beginning
        (talk("s:xy", "a:ab"), 6, "S(y)A(ab"),
        (talk("u:a", "u:b", "u:c"), 6, "U(b)U(c)"),
        (
            talk("u:abcdef", "a:g"),
            8,
            "U(def)A(g)",
        ),  # a short response leaves more room to its question
        (talk("a:x", "u:a", "a:b"), 8, "U(a)A(b)"),  # the rest begins with a question
        (talk("u:a", "a:b", "a:c"), 8, "A(b)A(c)"),  # the last response keeps the message before it
    ],
)
def test_unusual_conversations_that_are_too_long(
    byte_tokenizer: ChatTokenizer, conversation: Conversation, max_length: int, expected: str
) -> None:
    assert shown(byte_tokenizer.render(conversation, max_length).ids) == expected


@pytest.mark.parametrize(
    ("max_length", "expected", "cut"),
    [
        (8, "U(ab)A(cd)", False),
        (7, "U(b)A(cd)", False),  # only the question was cut
        (6, "U(b)A(c)", True),  # without the marker it would be A(cd
        (5, "U()A(c)", True),
        (2, "U()", True),
    ],
)
def test_a_truncated_response_ends_with_the_end_marker(
    byte_tokenizer: ChatTokenizer, max_length: int, expected: str, cut: bool
) -> None:
    rendered = byte_tokenizer.render_response(talk("u:ab"), Message("assistant", "cd"), max_length)
    assert (shown(rendered.ids), rendered.response_cut) == (expected, cut)


@given(conversation=conversations, max_length=st.integers(1, 60))
@settings(deadline=None, max_examples=300)
@pytest.mark.slow
def test_nothing_exceeds_the_maximum_length(
    byte_tokenizer: ChatTokenizer, conversation: Conversation, max_length: int
) -> None:
    for render, opening in ((byte_tokenizer.render, []), (byte_tokenizer.render_prompt, [ASSISTANT])):
        whole, fitted = render(conversation), render(conversation, max_length)
        assert len(fitted.ids) <= max_length
        assert len(fitted.ids) == len(fitted.loss_mask)
        assert fitted.ids[len(fitted.ids) - len(opening) :] == opening
        if len(whole.ids) <= max_length:
            assert fitted == whole
        else:
            assert fitted.dropped or fitted.cut
        if fitted.dropped and not fitted.cut and conversation.messages[0].role != "system":
            rest = Conversation(conversation.messages[fitted.dropped :])
            assert fitted.ids == render(rest).ids


def test_a_maximum_length_that_is_too_small_is_an_error(byte_tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match="max_length is 0"):
        byte_tokenizer.render_prompt(talk("u:ab"), 0)
    with pytest.raises(ValueError, match="max_length is -1"):
        byte_tokenizer.render(talk("u:ab"), -1)


# -- state --


def test_a_tokenizer_is_restored_from_its_state(tokenizer: ChatTokenizer, byte_tokenizer: ChatTokenizer) -> None:
    again = ChatTokenizer.from_state(tokenizer.state())
    conversation = talk("s:Be kind.", "u:What is 12 + 34?", "a:46, I think 🙂\n")
    assert again.render(conversation) == tokenizer.render(conversation)
    assert (again.name, again.vocab_size, again.state()) == (tokenizer.name, tokenizer.vocab_size, tokenizer.state())
    assert again.fingerprint == tokenizer.fingerprint != byte_tokenizer.fingerprint


def test_the_fingerprint_depends_on_the_pattern(byte_tokenizer: ChatTokenizer) -> None:
    other = ChatTokenizer.from_state({**byte_tokenizer.state(), "pattern": r"\w+|\W+"})
    assert other.fingerprint != byte_tokenizer.fingerprint


# -- encodings --


def test_packaged_encodings_have_the_size_given_in_their_name() -> None:
    assert packaged_encodings() == ["rlchat_1k"]
    assert ChatTokenizer().base_size == ChatTokenizer("rlchat_1k").base_size == 1024


def test_unknown_encodings_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown encoding 'klingon'; choose one of rlchat_1k, "):
        ChatTokenizer("klingon")
    for path in (tmp_path / "absent", Path("absent.tiktoken")):
        with pytest.raises(UserError, match=r"no such rank file; .* `rlchat tokenizer train`"):
            ChatTokenizer(str(path))


def test_an_encoding_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> tiktoken.Encoding:
        raise ConnectionError(f"{name}: no route")

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(UserError, match=r"cl100k_base is not on this machine .*ConnectionError.*TIKTOKEN_CACHE_DIR"):
        ChatTokenizer("cl100k_base")


# -- rank files --

BYTES = {bytes([byte]): byte for byte in range(256)}


def line(token: bytes, rank: int | str) -> bytes:
    return b"%s %s\n" % (base64.b64encode(token), str(rank).encode())


def test_ranks_are_written_in_order_one_per_line() -> None:
    assert format_ranks({b"b": 1, b"a": 0, b"ab": 2}) == b"YQ== 0\nYg== 1\nYWI= 2\n"


@given(extra=st.sets(st.binary(min_size=2, max_size=6), max_size=20))
@settings(deadline=None)
def test_ranks_survive_writing_and_reading(extra: set[bytes]) -> None:
    ranks = {**BYTES, **{token: 300 + place for place, token in enumerate(sorted(extra))}}
    assert parse_ranks(format_ranks(ranks), "x") == ranks


def test_blank_lines_and_other_line_endings_are_accepted() -> None:
    text = format_ranks(BYTES)
    assert parse_ranks(text.replace(b"\n", b"\r\n") + b"\n", "x") == BYTES


@pytest.mark.parametrize(
    "wrong",
    [b"YWI=\n", b"YWI= 256 1\n", b"Y\xff= 256\n", b"YW 256\n", b"YWI= many\n", line(b"ab", -1), line(b"ab", 2**31)],
)
def test_an_invalid_line_is_named(tmp_path: Path, wrong: bytes) -> None:
    path = tmp_path / "wrong.tiktoken"
    path.write_bytes(format_ranks(BYTES) + wrong + line(b"cd", 257))
    with pytest.raises(UserError, match=r"wrong\.tiktoken:257: not a line of a tiktoken rank file"):
        ChatTokenizer(str(path))


def test_incomplete_or_inconsistent_rank_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x: 2 of the 256 single bytes have no rank"):
        parse_ranks(format_ranks({token: rank for token, rank in BYTES.items() if rank > 1}), "x")
    with pytest.raises(UserError, match="x: some ranks are given twice"):
        parse_ranks(format_ranks({**BYTES, b"ab": 255}), "x")


def test_a_changed_rank_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.tiktoken"
    for tokens in (1, 2):
        path.write_bytes(format_ranks({**BYTES, **{b"ab" * place: 255 + place for place in range(1, tokens + 1)}}))
        assert ChatTokenizer(str(path)).base_size == 256 + tokens


# -- training --


def test_the_most_common_pairs_become_tokens() -> None:
    # " ab" four times: two merges, whichever comes first; then "cd" three times.
    ranks = train_ranks(iter([" ab ab ab ab", "cd", "cd", "cd"]), 259)
    learned = {token: rank for token, rank in ranks.items() if rank >= 256}
    assert learned in ({b"ab": 256, b" ab": 257, b"cd": 258}, {b" a": 256, b" ab": 257, b"cd": 258})
    assert sorted(ranks.values()) == list(range(259))
    assert all(bytes([byte]) in ranks for byte in range(256))


def test_training_stops_when_no_pair_is_left() -> None:
    assert len(train_ranks(iter(["ab"]), 5000)) == 257


def test_fewer_tokens_than_bytes_are_an_error() -> None:
    with pytest.raises(ValueError, match="255"):
        train_ranks(iter(["ab"]), 255)


def test_training_equals_that_of_the_tokenizers_library(tmp_path: Path) -> None:
    """On words without digits, GPT-2's pattern splits text like rlchat's, so the library's encoder must agree."""
    from tokenizers import ByteLevelBPETokenizer

    rhyme = "the rain in spain falls mainly on the plain while nine trains remain in the main lane again"
    words = rhyme.split()
    corpus = [" ".join(words[place:] + words[:place]) + " 🙂 é" for place in range(len(words))]
    reference = ByteLevelBPETokenizer(add_prefix_space=False)
    reference.train_from_iterator(iter(corpus), vocab_size=300, min_frequency=0, show_progress=False)
    path = tmp_path / "words.tiktoken"
    path.write_bytes(format_ranks(train_ranks(iter(corpus), 300)))
    ours = ChatTokenizer(str(path))
    assert ours.base_size == reference.get_vocab_size() == 300
    for text in [*corpus, "a plainer training", "é🙂é", "unseen words, with signs!"]:
        assert ours.encode(text) == reference.encode(text).ids


# -- named encodings --


def named_encoding(monkeypatch: pytest.MonkeyPatch, special_tokens: dict[str, int]) -> ChatTokenizer:
    """A tokenizer over what tiktoken returns for a name: the 256 bytes and ``he`` 256, and ``special_tokens``."""
    ranks = {**{bytes([byte]): byte for byte in range(256)}, b"he": 256}
    encoding = tiktoken.Encoding("small", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens=special_tokens)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: encoding)
    return ChatTokenizer("cl100k_base")


def test_a_named_encoding_with_unused_ids_and_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in cl100k_base, ids between the tokens and the last special token are unused: here 257, and 259 and 260."""
    tokenizer = named_encoding(monkeypatch, {"<|endoftext|>": 258, "<|endofprompt|>": 261})
    assert tokenizer.encode("hehe!") == [256, 256, 33]
    assert (tokenizer.base_size, tokenizer.pad_id, tokenizer.end_id) == (262, 262, 266)
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"
    assert {258, 261} <= tokenizer.special_ids
    assert not tokenizer.special_ids.intersection(tokenizer.encode("<|endoftext|><|endofprompt|>"))
    assert tokenizer.decode([256, 257, 258, 259, 260, 261, 33]) == "he!"
    assert tokenizer.unsayable_ids == [257, 258, 259, 260, 261, 262, 263, 264, 265]


def test_an_end_marker_that_the_encoding_already_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in o200k_harmony: the encoding's <|end|> keeps its id, and rlchat's marker follows the last id."""
    tokenizer = named_encoding(monkeypatch, {"<|end|>": 257, "<|return|>": 258})
    assert tokenizer.end_id == tokenizer.vocab_size - 1 == 263
    assert {257, 263} <= tokenizer.special_ids
    assert tokenizer.decode([257, 263]) == ""


def test_a_long_run_of_spaces_is_a_user_error_before_tiktoken_sees_it(
    tokenizer: ChatTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    for text in (" " * 1_000_000 + "a", "a" + "\n" * 100_001):
        with pytest.raises(UserError, match="cannot encode more than 100,000 white-space characters in a row; remove"):
            tokenizer.encode(text)
    assert capfd.readouterr().err == ""
    assert tokenizer.decode(tokenizer.encode("a" + " " * 100_000)) == "a" + " " * 100_000


def test_text_that_makes_tiktoken_panic_is_a_user_error(
    byte_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic(text: str) -> list[int]:
        raise PanicException("called `Result::unwrap()` on an `Err` value: RuntimeError(StackOverflow)")

    monkeypatch.setattr("tiktoken.Encoding.encode_ordinary", lambda self, text: panic(text))
    with pytest.raises(UserError, match="cannot encode a text of 9 characters; shorten it"):
        byte_tokenizer.encode("long text")


def test_an_interrupt_during_encoding_is_not_a_user_error(
    byte_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: tiktoken.Encoding, text: str) -> list[int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary", interrupt)
    with pytest.raises(KeyboardInterrupt):
        byte_tokenizer.encode("a")
