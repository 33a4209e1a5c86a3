"""The engine: responses in a batch equal single ones, and every ticket gets an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.chat_models import chain, random_policy, scripted_policy
from helpers.servers import alone, slow_down, wait_until

from rlchat.conversation import Conversation, Message
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, new_policy
from rlchat.models.sampling import Sampling
from rlchat.server.engine import Engine, EngineFullError, Piece, Ticket
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

GREEDY = Sampling(20, temperature=0.0)


class Reply:
    """Collects what is delivered to one ticket."""

    def __init__(self, bundle: PolicyBundle, question: str, sampling: Sampling = GREEDY, **more: Any) -> None:
        self.pieces: list[Piece] = []
        self.over = threading.Event()
        prompt = bundle.tokenizer.render_prompt(Conversation((Message("user", question),))).ids
        deadline = time.monotonic() + more.pop("seconds", 60)
        self.ticket = Ticket(prompt, sampling, self.deliver, deadline, **more)

    def deliver(self, piece: Piece) -> None:
        assert not self.over.is_set(), "nothing comes after the end"
        self.pieces.append(piece)
        if piece.finish:
            self.over.set()

    def wait(self) -> str:
        assert self.over.wait(30)
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        return self.pieces[-1].finish


@pytest.fixture(scope="module")
def bundle(tokenizer: ChatTokenizer) -> PolicyBundle:
    return random_policy(tokenizer, max_length=128)


@pytest.fixture
def engine(bundle: PolicyBundle) -> Iterator[Engine]:
    engine = Engine(bundle, max_rows=4, max_waiting=40)
    yield engine
    engine.close()


def questions(count: int) -> list[str]:
    return [f"{'Please. ' * (i % 5)}What comes after {i}?" for i in range(count)]


def test_concurrent_responses_equal_single_ones(bundle: PolicyBundle, engine: Engine) -> None:
    """Forty responses of different lengths in a batch of four rows, so that rows leave and join."""
    how = [
        Sampling(3 + i % 17, (0.0, 0.7, 1.0)[i % 3], top_k=(0, 5)[i % 2], top_p=(1.0, 0.9)[i % 2]) for i in range(40)
    ]
    replies = [Reply(bundle, q, how[i], seed=i, choice=i % 2) for i, q in enumerate(questions(40))]
    engine.submit([reply.ticket for reply in replies])
    responses = [reply.wait() for reply in replies]
    assert responses == [alone(bundle, q, how[i], seed=i, choice=i % 2) for i, q in enumerate(questions(40))]
    assert len({reply.pieces[-1].tokens for reply in replies}) > 5
    assert engine.counts.generated_tokens == sum(reply.pieces[-1].tokens for reply in replies)
    assert engine.counts.steps < engine.counts.generated_tokens / 2  # they shared the model's steps
    wait_until(lambda: engine.running == engine.waiting == 0)


def test_a_backbone_whose_batch_cannot_grow(tokenizer: ChatTokenizer) -> None:
    """With a sliding window a batch starts when the one before has ended; the text is the same."""
    torch.manual_seed(0)
    shape = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone = Backbone({**shape, "num_attention_heads": 2, "sliding_window": 8}, tokenizer.vocab_size, 64)
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    bundle = PolicyBundle(new_policy(backbone, tokenizer).eval(), tokenizer, 64)
    engine = Engine(bundle, max_rows=3)
    how = [Sampling(3 + i, temperature=0.0) for i in range(8)]
    replies = [Reply(bundle, q, how[i]) for i, q in enumerate(questions(8))]
    for reply in replies:
        engine.submit([reply.ticket])
    assert [reply.wait() for reply in replies] == [alone(bundle, q, how[i]) for i, q in enumerate(questions(8))]
    engine.close()


def test_a_stream_yields_complete_characters_and_ends_once(byte_tokenizer: ChatTokenizer) -> None:
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list("é€😀!".encode())))
    engine = Engine(bundle)
    streamed, whole = Reply(bundle, "Hi", streams=True), Reply(bundle, "Hi")
    cut = Reply(bundle, "Hi", Sampling(4), streams=True)
    engine.submit([streamed.ticket, whole.ticket, cut.ticket])
    assert whole.wait() == streamed.wait() == "é€😀!"
    assert [piece.text for piece in streamed.pieces] == ["é", "€", "😀", "!", ""]
    assert streamed.finish == whole.finish == "stop"
    assert whole.pieces == [Piece("é€😀!", 11, "stop")]  # ten bytes and the end marker
    assert (cut.wait(), cut.finish) == ("é", "length")  # the € was not complete
    engine.close()


def test_tickets_are_woken_once_after_each_step(byte_tokenizer: ChatTokenizer) -> None:
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"abc")))
    engine, calls = Engine(bundle), []

    def wake() -> None:
        calls.append("wake")

    replies = [Reply(bundle, "Hi", streams=True, wake=wake) for _ in range(3)]
    for reply in replies:
        reply.ticket.deliver = lambda piece, reply=reply: (calls.append(piece.text), reply.deliver(piece))  # type: ignore
    whole, woken = Reply(bundle, "Hi", wake=lambda: woken.append(list(whole.pieces))), []
    engine.submit([*(reply.ticket for reply in replies), whole.ticket])
    assert whole.wait() == "abc"
    engine.close()
    assert calls == [*"aaa", "wake", *"bbb", "wake", *"ccc", "wake", "", "", "", "wake"]
    assert woken == [[Piece("abc", 4, "stop")]]


def test_a_stop_string_ends_one_response_of_a_batch(byte_tokenizer: ChatTokenizer) -> None:
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"Helo wrd!")))
    engine = Engine(bundle)
    stopped = Reply(bundle, "Hi", stop=["o w", "xyz"], streams=True)
    held = Reply(bundle, "Hi", stop=["d!!"], streams=True)
    engine.submit([stopped.ticket, held.ticket])
    assert (stopped.wait(), stopped.finish) == ("Hel", "stop")
    assert (held.wait(), held.finish) == ("Helo wrd!", "stop")  # the held-back text comes at the end
    engine.close()


def test_a_full_queue_rejects_all_tickets_of_a_request(tokenizer: ChatTokenizer) -> None:
    bundle = slow_down(random_policy(tokenizer), 0.02)
    engine = Engine(bundle, max_rows=2, max_waiting=3)
    first = [Reply(bundle, "Hi", Sampling(40)) for _ in range(4)]
    engine.submit([reply.ticket for reply in first])
    wait_until(lambda: engine.running == 2)
    with pytest.raises(EngineFullError, match="the queue is full with 2 waiting"):
        engine.submit([Reply(bundle, "Hi").ticket for _ in range(2)])
    engine.submit([Reply(bundle, "Hi").ticket])
    with pytest.raises(EngineFullError):
        engine.submit([Reply(bundle, "Hi").ticket])
    engine.close()
    assert [reply.finish for reply in first] == ["failed"] * 4  # nothing waits on a closed engine
    with pytest.raises(EngineFullError):
        engine.submit([Reply(bundle, "Hi").ticket])


def test_cancelled_tickets_generate_no_more_tokens(tokenizer: ChatTokenizer) -> None:
    bundle = slow_down(random_policy(tokenizer), 0.01)
    engine = Engine(bundle, max_rows=1)
    gone, waited, other = (Reply(bundle, "Hi", Sampling(50), streams=True) for _ in range(3))
    engine.submit([gone.ticket, waited.ticket, other.ticket])
    wait_until(lambda: gone.pieces)
    gone.ticket.cancelled = waited.ticket.cancelled = True
    assert other.wait()
    assert engine.counts.cancelled == 2
    assert not gone.over.is_set()
    assert not waited.pieces
    assert engine.counts.generated_tokens < 50 + other.pieces[-1].tokens
    engine.close()


def test_time_limits(tokenizer: ChatTokenizer) -> None:
    bundle = slow_down(random_policy(tokenizer), 0.05)
    engine = Engine(bundle, max_rows=1)
    running, waiting = Reply(bundle, "Hi", Sampling(50), seconds=1.5), Reply(bundle, "Hi", seconds=0.3)
    engine.submit([running.ticket, waiting.ticket])
    assert waiting.wait() == ""
    assert waiting.finish == "expired"
    assert running.wait()
    assert running.finish == "length"
    assert running.pieces[-1].tokens < 50
    engine.close()


def test_an_error_fails_the_batch_but_not_the_next_one(
    bundle: PolicyBundle, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def broken(*_: object) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(bundle.model, "forward", broken)
        reply = Reply(bundle, "Hi")
        engine.submit([reply.ticket])
        reply.wait()
        assert reply.finish == "failed"
    reply = Reply(bundle, "Hi")
    engine.submit([reply.ticket])
    assert reply.wait() == alone(bundle, "Hi", GREEDY)
    assert engine.alive


def test_a_swap_lets_running_and_queued_responses_finish_on_their_model(byte_tokenizer: ChatTokenizer) -> None:
    old, new = (
        slow_down(scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(text), endless=True)), 0.002)
        for text in (b"old ", b"new!")
    )
    engine = Engine(old, max_rows=3, version="chat.pt")
    before = [Reply(old, "Hi", Sampling(length, 0.0), streams=True) for length in (40, 30, 20, 10)]
    engine.submit([reply.ticket for reply in before])  # the last one waits for a place
    wait_until(lambda: len(before[0].pieces) > 2)
    engine.swap(new, "1.pt")
    after = Reply(new, "Hi", Sampling(20, 0.0), streams=True)
    engine.submit([after.ticket])
    assert after.wait() == "new!" * 5
    assert [reply.wait() for reply in before] == [
        "old " * (length // 4) + "ol" * (length % 4 == 2) for length in (40, 30, 20, 10)
    ]
    versions = [reply.ticket.loaded.version for reply in (*before, after) if reply.ticket.loaded is not None]
    assert versions == ["chat.pt"] * 4 + ["1.pt"]
    wait_until(lambda: engine.running == engine.waiting == 0)
    assert engine.counts.generated_tokens == 120
    engine.close()


def test_two_models_generate_beside_each_other(byte_tokenizer: ChatTokenizer) -> None:
    old, new = (
        scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(text), endless=True)) for text in (b"old ", b"new!")
    )
    engine = Engine(slow_down(old, 0.01), version="chat.pt")
    first = Reply(old, "Hi", Sampling(50, 0.0), streams=True)
    engine.submit([first.ticket])
    wait_until(lambda: len(first.pieces) > 0)
    engine.swap(new, "1.pt")
    second = Reply(new, "Hi", Sampling(5, 0.0))
    engine.submit([second.ticket])
    assert second.wait() == "new!n"
    assert not first.over.is_set()
    first.ticket.cancelled = True
    wait_until(lambda: engine.running == 0)
    engine.close()


def test_a_model_that_fails_ends_only_its_own_responses(
    byte_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (
        slow_down(scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(text), endless=True)), 0.002)
        for text in (b"old ", b"new!")
    )
    engine = Engine(old, version="chat.pt")
    first = Reply(old, "Hi", Sampling(40, 0.0), streams=True)
    engine.submit([first.ticket])
    wait_until(lambda: len(first.pieces) > 0)

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(new.model, "forward", broken)
    engine.swap(new, "1.pt")
    second = Reply(new, "Hi")
    engine.submit([second.ticket])
    second.wait()
    assert second.finish == "failed"
    assert first.wait() == "old " * 10
    assert engine.alive
    engine.close()


def test_a_version_with_another_tokenizer_is_refused(
    bundle: PolicyBundle, byte_tokenizer: ChatTokenizer, engine: Engine
) -> None:
    with pytest.raises(ValueError, match="another tokenizer"):
        engine.swap(random_policy(byte_tokenizer), "1.pt")
    assert engine.loaded.bundle is bundle
