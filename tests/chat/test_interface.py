"""ChatInterface: scripted models with known responses, prompts worked out by hand, and a random model."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.chat_models import chain, random_policy, scripted_policy
from helpers.full_disk import largest_file
from torch import Tensor

import rlchat
from rlchat.chat.feedback import Correction
from rlchat.chat.interface import ChatInterface
from rlchat.chat.saved import load_conversation
from rlchat.conversation import Conversation, Message
from rlchat.data.formats import read_trees
from rlchat.errors import UserError
from rlchat.models.model_file import save_bundle
from rlchat.models.sampling import Sampling, Step
from rlchat.rewards import Reply
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

PAD, SYSTEM, USER, ASSISTANT, END = range(256, 261)  # of byte_tokenizer


@pytest.fixture(scope="module")
def random_model(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.pt"
    save_bundle(path, random_policy(tokenizer))
    return path


def scripted(tokenizer: ChatTokenizer, folder: Path, reply: list[int], max_length: int = 64) -> ChatInterface:
    save_bundle(folder / "scripted.pt", scripted_policy(tokenizer, chain(tokenizer, reply), max_length))
    return ChatInterface(folder / "scripted.pt", device="cpu")


def turn(question: str, reply: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", reply)


# -- what is said, and remembered --


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_response_is_what_the_model_generates(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, temperature: float
) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list(b"Helo wrd!"))
    assert chat.generate_response("Hi", temperature=temperature) == "Helo wrd!"
    assert list(chat.stream_response("Hi again", temperature=temperature)) == list("Helo wrd!")
    assert chat.history == (*turn("Hi", "Helo wrd!"), *turn("Hi again", "Helo wrd!"))
    chat.clear()
    assert chat.history == ()


def test_pieces_are_whole_characters(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list("é€😀!".encode()))
    assert list(chat.stream_response("Hi")) == ["é", "€", "😀", "!"]


def test_a_character_that_the_limit_cuts_is_left_out(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list("a🙂b".encode()))
    assert [chat.generate_response("Hi", max_new_tokens=n) for n in range(1, 7)] == ["a"] * 4 + ["a🙂", "a🙂b"]


def test_invalid_utf8_becomes_replacement_characters(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat = scripted(byte_tokenizer, tmp_path, [0x61, 0xFF, 0x62, 0xC3])  # at its end, the first half of an é
    assert chat.generate_response("Hi") == "a\ufffdb\ufffd"


def test_an_empty_response_is_kept_in_the_history(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    save_bundle(tmp_path / "silent.pt", scripted_policy(byte_tokenizer, {}))
    chat = ChatInterface(tmp_path / "silent.pt")
    assert chat.generate_response("Hi") == ""
    assert chat.history == turn("Hi", "")


def test_closing_the_stream_keeps_the_partial_response(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list(b"Helo"))
    never_begun = chat.stream_response("Hi")
    never_begun.close()
    assert chat.history == ()

    stream = chat.stream_response("Hi")
    assert next(stream) + next(stream) == "He"
    stream.close()
    assert chat.history == turn("Hi", "He")


def step(token: int) -> Step:
    return Step(torch.tensor([token]), torch.zeros(1))


class Interrupted:
    """Stands in for ``sample``: some tokens, then Ctrl-C."""

    def __init__(self, tokens: bytes) -> None:
        self.tokens = tokens

    def __call__(self, *args: Any, **named: Any) -> Iterator[Step]:
        yield from (step(token) for token in self.tokens)
        raise KeyboardInterrupt


@pytest.mark.parametrize(("said", "kept"), [(b"", ()), (b"\xc3", ()), (b"He", turn("Hi", "He"))])
def test_ctrl_c_keeps_the_partial_response(
    byte_tokenizer: ChatTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: bytes,
    kept: tuple[Message, ...],
) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list(b"Hello"[:3]))
    monkeypatch.setattr("rlchat.chat.generation.sample", Interrupted(said))
    with pytest.raises(KeyboardInterrupt):
        chat.generate_response("Hi")
    assert chat.history == kept


# -- what the model is asked --


class Recorder:
    """Replaces ``sample``: records its arguments and generates ``ok``."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []

    def __call__(
        self, model: object, ids: Tensor, mask: Tensor, sampling: Sampling, noise: object, **named: object
    ) -> Iterator[Step]:
        assert mask.all()
        assert mask.shape == ids.shape
        assert {name: named[name] for name in ("end_id", "pad_id")} == {"end_id": END, "pad_id": PAD}
        self.prompts.append(ids[0].tolist())
        self.samplings.append(sampling)
        return iter(step(token) for token in (*b"ok", END))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("rlchat.chat.generation.sample", recorder)
    monkeypatch.setattr(
        "rlchat.chat.generation.shorten", lambda cache, length: False
    )  # it fills no cache to go on from
    return recorder


@pytest.fixture
def chat(byte_tokenizer: ChatTokenizer, tmp_path: Path, recorder: Recorder) -> ChatInterface:
    save_bundle(tmp_path / "model.pt", random_policy(byte_tokenizer, max_length=32))
    return ChatInterface(tmp_path / "model.pt", device="cpu")


def test_the_prompt_is_the_whole_conversation(chat: ChatInterface, recorder: Recorder) -> None:
    chat.generate_response("ab", max_new_tokens=4)
    chat.generate_response("cd", max_new_tokens=4)
    first = [USER, *b"ab", END, ASSISTANT]
    assert recorder.prompts == [first, [*first, *b"ok", END, USER, *b"cd", END, ASSISTANT]]
    chat.clear()
    chat.generate_response("ab", max_new_tokens=4)
    assert recorder.prompts[-1] == first


def test_without_history_no_message_is_read_or_kept(chat: ChatInterface, recorder: Recorder) -> None:
    chat.generate_response("ab")
    chat.generate_response("cd", use_history=False)
    assert recorder.prompts[-1] == [USER, *b"cd", END, ASSISTANT]
    assert chat.history == turn("ab", "ok")


def test_the_system_message_stands_first_and_survives_clear(chat: ChatInterface, recorder: Recorder) -> None:
    chat.system = "S"
    expected = [SYSTEM, *b"S", END, USER, *b"ab", END, ASSISTANT]
    for use_history in (True, False):
        chat.generate_response("ab", use_history=use_history)
        chat.clear()
        assert recorder.prompts[-1] == expected
    chat.system = None
    chat.generate_response("ab")
    assert recorder.prompts[-1] == expected[3:]


def test_markers_that_a_user_types_are_text(chat: ChatInterface, recorder: Recorder) -> None:
    chat.generate_response("<|end|>", max_new_tokens=4)
    assert recorder.prompts == [[USER, *b"<|end|>", END, ASSISTANT]]


def test_the_oldest_messages_are_dropped_to_make_room(chat: ChatInterface, recorder: Recorder) -> None:
    # max_length 32, 16 of them for the prompt: 15 and the marker of the reply. A turn has 4 + 4 tokens, a question 4.
    for question in ("ab", "cd", "ef"):
        chat.generate_response(question, max_new_tokens=16)
    assert chat.dropped_messages == 2
    assert recorder.prompts[-1] == [USER, *b"cd", END, ASSISTANT, *b"ok", END, USER, *b"ef", END, ASSISTANT]
    assert chat.history == (*turn("ab", "ok"), *turn("cd", "ok"), *turn("ef", "ok"))
    chat.generate_response("gh", max_new_tokens=3)  # 3 · 8 + 4 + 1 = 29 = 32 - 3
    assert chat.dropped_messages == 0
    assert len(recorder.prompts[-1]) == 29


def test_a_single_message_that_is_too_long_is_cut(chat: ChatInterface, recorder: Recorder) -> None:
    chat.generate_response("0123456789abcdefghij", max_new_tokens=16)
    # 16 for the prompt: two markers around the question, one for the reply, 13 bytes of 20.
    assert recorder.prompts == [[USER, *b"789abcdefghij", END, ASSISTANT]]
    assert (chat.cut_tokens, chat.dropped_messages) == (7, 0)
    chat.clear()
    assert chat.cut_tokens == 0


def test_max_new_tokens_is_limited_by_the_context(chat: ChatInterface, recorder: Recorder) -> None:
    chat.generate_response("ab", max_new_tokens=10, temperature=0.5, top_k=3, top_p=0.9)
    chat.generate_response("ab", max_new_tokens=1000, use_history=False)  # the prompt has 5 of 32
    chat.generate_response("0123456789abcdefghij", max_new_tokens=1000, use_history=False)  # and never more than half
    assert recorder.samplings == [Sampling(10, 0.5, 3, 0.9), Sampling(27, 0.7), Sampling(16, 0.7)]


# -- randomness, and a model that looks at more than one token --


def test_greedy_is_the_likeliest_token_of_the_whole_context(random_model: Path) -> None:
    chat = ChatInterface(random_model, device="cpu")
    tokenizer = chat.tokenizer
    user, assistant, end = (tokenizer.base_size + marker for marker in (2, 3, 4))
    ids: list[int] = []
    for question in ("Hello, how are you?", "And what is that?"):
        ids += [user, *tokenizer.encode(question), end, assistant]
        reply: list[int] = []
        for _ in range(4):  # the whole context again for each token: no cache
            row = torch.tensor([ids + reply])
            with torch.no_grad():
                logits = chat.model.logits(chat.model(row, torch.ones_like(row))[0, -1])
            reply.append(int(logits.argmax()))
        expected = "".join(map(tokenizer.stream().push, reply))
        assert chat.generate_response(question, 4, temperature=0) == expected
        ids += [*tokenizer.encode(expected), end]


def test_a_seed_repeats_a_whole_chat(random_model: Path) -> None:
    def talk(seed: int | None) -> list[str]:
        chat = ChatInterface(random_model, seed=seed)
        return [chat.generate_response("Hello", 12, temperature=1.0) for _ in range(2)]

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)
    assert talk(None) != talk(None)
    first, second = talk(1)
    assert first != second


def test_top_k_1_is_greedy(random_model: Path) -> None:
    greedy = ChatInterface(random_model).generate_response("Hello", 12, temperature=0)
    assert ChatInterface(random_model).generate_response("Hello", 12, temperature=2.0, top_k=1) == greedy
    assert ChatInterface(random_model).generate_response("Hello", 12, temperature=2.0, top_p=1e-9) == greedy


def test_a_random_model_generates_no_special_tokens(random_model: Path) -> None:
    chat = ChatInterface(random_model, seed=0)
    for _ in range(5):
        pieces = list(chat.stream_response("Hello", 60, temperature=1.5, use_history=False))
        assert all(pieces)
        assert "<|" not in "".join(pieces)


# -- the cache that lasts from turn to turn --


def counted(chat: ChatInterface) -> list[int]:
    """Records the number of tokens of each forward pass."""
    fed: list[int] = []
    chat.model.backbone.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    return fed


QUESTIONS = ["Hello, how are you?", "And what is that?", "Why?", "I do not know."]


def test_cached_tokens_are_not_computed_again(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list(b"Helo"))
    fed = counted(chat)
    chat.generate_response("ab", 8)
    assert fed == [5, 1, 1, 1, 1]  # the question with its markers; each letter; the end marker was drawn, and not fed
    del fed[:]
    chat.generate_response("c", 8)
    assert fed == [5, 1, 1, 1, 1]  # the end marker, and c with its markers
    del fed[:]
    chat.generate_response("d", 3)
    assert fed == [5, 1, 1]  # stopped by the limit: H and e are fed, l is not
    del fed[:]
    chat.generate_response("e", 3)
    assert fed == [6, 1, 1]  # l, the end marker, and e with its markers
    assert chat.dropped_messages == 0
    del fed[:]
    chat.generate_response("f" * 55, 3)  # nothing else fits beside that; all that is alike is the first marker
    assert chat.dropped_messages == 8
    assert fed == [57, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_the_same_without_the_cache(
    tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    save_bundle(tmp_path / "model.pt", random_policy(tokenizer, max_length=512))

    def talk() -> tuple[tuple[Message, ...], int]:
        chat = ChatInterface(tmp_path / "model.pt", device="cpu", seed=3)
        fed = counted(chat)
        for question in QUESTIONS * 2:
            chat.generate_response(question, 8, temperature)
        return chat.history, sum(fed)

    said, fed = talk()
    monkeypatch.setattr("rlchat.chat.generation.shorten", lambda cache, length: False)
    said_without, fed_without = talk()
    assert said == said_without
    assert fed < fed_without / 2


def test_the_cache_is_not_used_after_a_change(random_model: Path, tmp_path: Path) -> None:
    """Undo, a correction, Ctrl-C, a loaded file, another system message, a question without history."""
    chat = ChatInterface(random_model, device="cpu")

    def check() -> None:
        fresh = ChatInterface(random_model, device="cpu")
        chat.save(tmp_path / "talk.json", overwrite=True)
        fresh.load(tmp_path / "talk.json")
        assert chat.generate_response("So?", 6, 0) == fresh.generate_response("So?", 6, 0)

    chat.generate_response("Hello", 6, 0)
    chat.generate_response("aside", 6, 0, use_history=False)
    check()
    chat.undo()
    check()
    chat.add_feedback(Correction("I am fine."), tmp_path / "feedback.jsonl")
    check()
    chat.system = "Be brief."
    check()
    chat.clear()
    stream = chat.stream_response("Hello", 30, 0)
    next(stream)
    stream.close()
    check()


def test_ctrl_c_within_the_model_leaves_the_cache_consistent(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, fresh = (ChatInterface(random_model, device="cpu") for _ in range(2))
    last_layer = chat.model.backbone.transformer.layers[-1]
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = last_layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.generate_response("Hello", 30, 0)
    hook.remove()
    said = chat.history[-1].text
    assert 0 < len(chat.tokenizer.encode(said)) <= 3
    fed = counted(chat)
    reply = chat.generate_response("So?", 6, 0)
    assert fed[0] < len(chat.tokenizer.encode("HelloSo?")) + 3 + len(chat.tokenizer.encode(said))
    fresh._messages = chat._messages[:2]
    assert fresh.generate_response("So?", 6, 0) == reply


# -- many prompts at once --


PROMPTS = ["Hello", "And what is that? I do not know.", "Why?", "Hello, how are you?", "x", "y", "<|end|>"]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_batch_equals_single_responses(random_model: Path, batch_size: int) -> None:
    chat = ChatInterface(random_model, device="cpu")
    alone = [chat.generate_response(prompt, 10, 0, use_history=False) for prompt in PROMPTS]
    assert len(set(alone)) > 3
    fed = counted(chat)
    assert chat.batch(PROMPTS, 10, 0, batch_size=batch_size) == alone
    assert len(fed) <= 10 * -(-len(PROMPTS) // batch_size)  # of the model's passes, one serves a whole batch
    assert chat.history == ()


def test_a_batch_near_the_end_of_the_context(random_model: Path) -> None:
    """A prompt may have half of the 64 tokens; the longer it is, the fewer are left to the response."""
    chat = ChatInterface(random_model, device="cpu")
    prompts = [*PROMPTS, "Hello, how are you? " * 20]
    alone = [chat.generate_response(prompt, 60, 0, use_history=False) for prompt in prompts]
    assert chat.cut_tokens > 0
    cut = chat.cut_tokens
    assert chat.batch(prompts, 60, 0) == alone
    assert chat.cut_tokens == cut


def test_each_prompt_of_a_batch_has_its_own_random_numbers(random_model: Path) -> None:
    def talk(seed: int, batch_size: int) -> list[str]:
        return ChatInterface(random_model, device="cpu", seed=seed).batch(["Hello"] * 5, 10, 1.0, batch_size=batch_size)

    assert talk(1, 5) == talk(1, 2)
    assert len(set(talk(1, 5))) > 1
    assert talk(1, 5) != talk(2, 5)


def test_a_batch_of_conversations(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list("Helo 🙂".encode()))
    chat.system = "S"
    talk = Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "c")))
    replies = chat.batch_replies(["Hi", talk], 8, 0)
    assert replies == [Reply("Helo ", 8, False)] * 2  # the character that the limit cuts is left out
    assert chat.batch(["Hi", talk], 9, 0) == ["Helo 🙂"] * 2
    assert chat.batch([]) == []


def test_a_batch_shows_its_progress(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = ChatInterface(random_model, device="cpu")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    chat.batch(PROMPTS, 2, 0, batch_size=2)
    assert capsys.readouterr().err == ""  # that was quick
    monkeypatch.setattr("rlchat.utils.progress.PROGRESS_AFTER_SECONDS", 0.0)
    chat.batch(PROMPTS, 2, 0, batch_size=2)
    assert "generating" in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["", " \n", Conversation((Message("assistant", "Hi"),)), Conversation(())])
def test_an_empty_prompt_is_named(random_model: Path, empty: str | Conversation) -> None:
    with pytest.raises(UserError, match="prompt 2 is empty"):
        ChatInterface(random_model).batch(["Hello", empty])


# -- files, feedback and the rest of a conversation --


def test_a_saved_conversation_can_be_continued(random_model: Path, tmp_path: Path) -> None:
    chat = ChatInterface(random_model, device="cpu", seed=5)
    chat.system = "Be brief."
    chat.generate_response("Hello", 5, 0.5, top_k=3)
    chat.save(tmp_path / "talk.json")
    with pytest.raises(UserError, match="exists"):
        chat.save(tmp_path / "talk.json")
    saved = load_conversation(tmp_path / "talk.json")
    assert saved.model == "random.pt"
    assert saved.sampling == {"max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 1.0, "seed": 5}
    assert [message.role for message in saved.messages] == ["system", "user", "assistant"]
    assert all(message.time for message in saved.messages[1:])

    other = ChatInterface(random_model, device="cpu")
    other.generate_response("Something else", 5)
    assert other.load(tmp_path / "talk.json") == saved
    assert (other.system, other.history) == (chat.system, chat.history)
    assert other.generate_response("So?", 6, 0) == chat.generate_response("So?", 6, 0)


def test_a_failed_load_changes_nothing(random_model: Path, tmp_path: Path) -> None:
    chat = ChatInterface(random_model, device="cpu")
    chat.generate_response("Hello", 5)
    before = chat.history
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        chat.load(tmp_path / "damaged.json")
    with largest_file(10), pytest.raises(UserError, match="File too large"):
        chat.save(tmp_path / "talk.json")
    assert chat.history == before


def test_an_older_file(random_model: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"conversation_history": [{"user": "Hi", "assistant": "Hello!"}]}')
    chat = ChatInterface(random_model, device="cpu")
    chat.system = "Be brief."
    chat.load(tmp_path / "old.json")
    assert (chat.system, chat.history) == (None, turn("Hi", "Hello!"))
    assert chat.last_turn == (Conversation((Message("user", "Hi"),)), Reply("Hello!", 3, True))


def test_undo_removes_a_turn(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat = scripted(byte_tokenizer, tmp_path, list(b"Helo"))
    for question in ("a", "b"):
        chat.generate_response(question)
    assert chat.undo() == "b"
    assert chat.history == turn("a", "Helo")
    assert chat.undo() == "a"
    assert chat.undo() is None
    assert chat.last_turn is None
    chat.redo()
    assert chat.history == turn("a", "Helo")
    chat.undo()
    chat.generate_response("c")
    chat.redo()  # too late
    assert chat.history == turn("c", "Helo")


def test_feedback_on_the_last_reply(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat, path = scripted(byte_tokenizer, tmp_path, list(b"Helo")), tmp_path / "feedback.jsonl"
    with pytest.raises(UserError, match="no response yet"):
        chat.add_feedback("good", path)
    chat.generate_response("Hi")
    assert chat.add_feedback("good", path)
    assert chat.add_feedback(Correction("Hello!"), path)
    assert chat.history == turn("Hi", "Hello!")
    good, better = (json.loads(line)["prompt"]["replies"] for line in path.read_text().splitlines())
    assert [(r["text"], r["labels"]["quality"]["value"], r["model_name"]) for r in good] == [
        ("Helo", 1.0, "scripted.pt")
    ]
    assert [(r["text"], r["rank"]) for r in better] == [("Hello!", 0), ("Helo", 1)]


def test_the_last_verdict_on_a_response_counts(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat, path = scripted(byte_tokenizer, tmp_path, list(b"Helo")), tmp_path / "feedback.jsonl"
    chat.generate_response("Hi")
    assert chat.add_feedback("good", path)
    assert not chat.add_feedback("good", path)
    assert chat.add_feedback("bad", path)
    assert chat.add_feedback("good", path)  # it was bad in between
    assert len(path.read_text().splitlines()) == 3
    assert chat.add_feedback("good", tmp_path / "other.jsonl")
    assert chat.add_feedback("bad", path)
    (prompt,) = read_trees([path], progress=False)[0][0].prompts
    assert [(r.text, r.quality) for r in prompt.references] == [("Helo", 0.0)]


def test_a_corrected_response_cannot_be_rated(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    chat, path = scripted(byte_tokenizer, tmp_path, list(b"Helo")), tmp_path / "feedback.jsonl"
    chat.generate_response("Hi")
    assert [chat.add_feedback(Correction(text), path) for text in ("Hello!", "Hello!")] == [True, False]
    chat.generate_response("Bye")
    chat.undo()
    for verdict in ("good", "bad"):
        with pytest.raises(UserError, match=r"^the last response is your correction"):
            chat.add_feedback(verdict, path)  # type: ignore[arg-type]
    assert chat.add_feedback(Correction("Hello there!"), path)
    first, second = (json.loads(line)["prompt"]["replies"] for line in path.read_text().splitlines())
    assert [(r["text"], r.get("model_name")) for r in first] == [("Hello!", None), ("Helo", "scripted.pt")]
    assert [(r["text"], r.get("model_name")) for r in second] == [("Hello there!", None), ("Helo", "scripted.pt")]


def test_the_reward_of_the_last_reply(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"Helo wrd")))
    bundle.about["reward"] = [{"class_path": "rlchat.rewards.MissingEnd", "init_args": {"weight": 0.5}}]
    save_bundle(tmp_path / "rl.pt", bundle)
    chat = ChatInterface(tmp_path / "rl.pt")
    chat.generate_response("Hi", 3)
    assert chat.score_last_response() == ({"missing_end": -0.5}, None)
    chat.generate_response("Hi")
    assert chat.score_last_response() == ({"missing_end": 0.0}, None)


def test_texts_through_the_tokenizer(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatInterface(random_model, device="cpu")
    checks = chat.tokenization_test()
    assert all(check.intact for check in checks)
    assert {"<|user|>" in check.text for check in checks} == {True, False}
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids: "Hello, how are you?")
    assert [check.intact for check in chat.tokenization_test()] == [True] + [False] * (len(checks) - 1)


def test_the_dtype_can_be_chosen(random_model: Path) -> None:
    assert ChatInterface(random_model, device="cpu").dtype == torch.float32
    chat = ChatInterface(random_model, device="cpu", dtype="bfloat16")
    assert {weight.dtype for weight in chat.model.parameters()} == {torch.bfloat16}
    assert isinstance(chat.generate_response("Hello", 5, 0), str)
    assert len(chat.batch(["Hello", "Why?"], 5)) == 2


# -- one response at a time --


def test_two_streams_of_one_interface(random_model: Path) -> None:
    chat, expected = (ChatInterface(random_model, device="cpu") for _ in range(2))
    whole = expected.generate_response("Hello", 8, 0)
    stream = chat.stream_response("Hello", 8, 0)
    first = next(stream)
    calls: list[Callable[[], object]] = [
        lambda: chat.generate_response("Bye"),
        lambda: chat.batch(["Bye"]),
        lambda: list(chat.stream_response("Bye")),
        chat.clear,
        chat.undo,
    ]
    for call in calls:
        with pytest.raises(UserError, match="is generating another response: finish or close that stream first"):
            call()
    assert first + "".join(stream) == whole  # undisturbed
    assert chat.history == turn("Hello", whole)
    assert chat.generate_response("So?", 8, 0) == expected.generate_response("So?", 8, 0)


def test_threads_of_one_interface(random_model: Path) -> None:
    """Each thread gets the right response or the error."""
    chat = ChatInterface(random_model, device="cpu")
    expected = {prompt: chat.generate_response(prompt, 8, 0, use_history=False) for prompt in PROMPTS}
    found: list[tuple[str, str]] = []
    refused: list[UserError] = []

    def ask(prompt: str) -> None:
        for _ in range(5):
            try:
                found.append((prompt, chat.generate_response(prompt, 8, 0, use_history=False)))
            except UserError as error:
                refused.append(error)

    threads = [threading.Thread(target=ask, args=[prompt]) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) + len(refused) == 5 * len(PROMPTS)  # no other exception ended a thread
    assert found
    assert all(expected[prompt] == response for prompt, response in found)


# -- what cannot work --


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_message_is_refused_at_once(chat: ChatInterface, text: str) -> None:
    with pytest.raises(UserError, match="empty"):
        chat.stream_response(text)
    assert chat.history == ()


def test_seeds_of_numpy_and_system_messages(random_model: Path, tmp_path: Path) -> None:
    chat = ChatInterface(random_model, device="cpu", seed=np.int64(3))  # type: ignore[arg-type]
    response = chat.generate_response("Hello", 8)
    assert response == ChatInterface(random_model, device="cpu", seed=3).generate_response("Hello", 8)
    chat.save(tmp_path / "chat.json")
    assert load_conversation(tmp_path / "chat.json").sampling["seed"] == 3
    with pytest.raises(UserError, match=r"^invalid system message 3: expected a string or None$"):
        chat.system = 3  # type: ignore[assignment]


def test_top_k_minus_one_means_all_tokens(random_model: Path) -> None:
    off, minus_one = (ChatInterface(random_model, device="cpu", seed=3) for _ in range(2))
    assert off.generate_response("Hi", 9, 1.0, top_k=0) == minus_one.generate_response("Hi", 9, 1.0, top_k=-1)


def test_a_message_that_is_not_text_is_refused(chat: ChatInterface) -> None:
    with pytest.raises(UserError, match=r"^invalid message None: expected a string$"):
        chat.generate_response(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "how", "why"),
    [
        ("abc", {}, "invalid prompts: expected a list of prompts, got a single one"),
        (Conversation((Message("user", "Hi"),)), {}, "invalid prompts: expected a list of prompts"),
        (["Hi", None], {}, "invalid prompt 2: expected a string or a Conversation, got None"),
        (["Hi"], {"batch_size": 0}, "invalid value 0 for batch_size: expected a positive integer"),
        (["Hi"], {"batch_size": "2"}, "invalid value '2' for batch_size: expected a positive integer"),
        (["Hi"], {"temperature": "hot"}, "invalid value 'hot' for temperature: expected a number"),
    ],
)
def test_an_invalid_batch_is_refused(chat: ChatInterface, prompts: Any, how: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"^{why}"):
        chat.batch(prompts, **how)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-50},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": "hot"},
        {"top_p": None},
        {"max_new_tokens": 1.5},
        {"top_k": "5"},
    ],
)
def test_a_number_out_of_range_is_refused_at_once(chat: ChatInterface, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        chat.stream_response("Hi", **wrong)


def test_invalid_models_devices_and_seeds(random_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.pt: no such model file; .*rlchat demo"):
        ChatInterface(tmp_path / "nope.pt")
    with pytest.raises(UserError, match="device 'abacus'"):
        ChatInterface(random_model, device="abacus")
    for seed in (2**63, -1, "1"):
        with pytest.raises(UserError, match=f"^invalid value {seed!r} for seed: expected an integer from 0 to"):
            ChatInterface(random_model, seed=seed)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_available(random_model: Path) -> None:
    with pytest.raises(UserError, match="device 'cuda'"):
        ChatInterface(random_model, device="cuda")


def test_the_fastest_device_is_the_default(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def load(path: Path, device: torch.device, base_model: str | None) -> None:
        chosen.append(device.type)
        raise UserError("that is all this test wants to know")

    monkeypatch.setattr("rlchat.chat.interface.load_policy", load)
    for cuda, mps in [(True, True), (False, True), (False, False)]:
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda mps=mps: mps)
        with pytest.raises(UserError, match="all this test"):
            ChatInterface(random_model)
    assert chosen == ["cuda", "mps", "cpu"]


def test_chat_does_not_import_lightning(random_model: Path) -> None:
    program = """
import sys
from rlchat import ChatInterface
assert ChatInterface(sys.argv[1], seed=0).generate_response("Hello", 5) is not None
assert not [name for name in sys.modules if name.split(".")[0] in ("lightning", "torchmetrics", "matplotlib")]
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(random_model)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_chat_interface_is_exported() -> None:
    assert rlchat.ChatInterface is ChatInterface
