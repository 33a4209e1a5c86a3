"""`Engine`: continuous batching.

One thread owns the model and runs one batch. A request joins the batch at the next token and leaves it when its
response ends, so no request waits for another's long response. After a swap of the model, new requests form a batch of
the new model, and the batch of the old one runs beside it until its responses have ended. Tokens come from
:func:`rlchat.models.sampling.sample`, as in training. Each response has its own random numbers, so a seed gives the
same response alone and in a batch, up to floating-point rounding: the batch affects the logits of a row in their
last digits, which rarely changes a token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlchat.models.kv_cache import can_append
from rlchat.models.model_file import PolicyBundle, identity
from rlchat.models.sampling import Change, Sampling, Step, Uniforms, addressed_uniforms, sample
from rlchat.server.logprobs import TokenLogprob, token_logprobs
from rlchat.server.stop_strings import StopStrings
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad

log = logging.getLogger("rlchat")

_STREAM = 0  # of the addressed random numbers: the address of a response is its seed and the index of its choice

Finish = Literal["stop", "length", "expired", "failed"]
"""Why a response ended: an end marker or stop string; the limit of tokens or time; the time limit before the first
token; an error of the engine."""


class EngineFullError(Exception):
    """The queue is full."""


class Piece(NamedTuple):
    """A piece of a response."""

    text: str
    tokens: int  # sampled so far, the end marker included
    finish: Finish | None = None  # None if more pieces follow
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens of this piece, if the ticket asks for them


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model in memory: the name of its file, and its :func:`rlchat.models.model_file.identity`."""

    bundle: PolicyBundle
    version: str = ""
    model_id: str = ""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request for one response.

    ``deliver`` is called from the engine's thread: with each piece if ``streams`` is True, else once with the whole
    text. ``wake`` is called after all pieces of a step were delivered, once for the tickets that have the same one.
    ``deadline`` is a time of :func:`time.monotonic`. Setting ``cancelled`` stops the response. ``loaded`` is the model
    that generates it; None: the one that is active when the ticket is submitted.
    """

    prompt: Sequence[int]
    sampling: Sampling
    deliver: Callable[[Piece], None]
    deadline: float
    seed: int = 0
    choice: int = 0  # index among the responses to one request; each has different random numbers
    stop: Sequence[str] = ()
    logprobs: int | None = None  # deliver the log-prob of each token and of this many of the most likely ones
    streams: bool = False
    cancelled: bool = False
    wake: Callable[[], None] = lambda: None
    loaded: Loaded | None = None


@dataclass(slots=True)
class Counts:
    """Totals since the engine started."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0  # forward passes, each one token per row
    cancelled: int = 0


class Engine:
    """Generates at most ``max_rows`` responses at a time and queues ``max_waiting``; :meth:`close` stops it.

    ``version`` is the name of the model's file.
    """

    def __init__(self, bundle: PolicyBundle, *, max_rows: int = 64, max_waiting: int = 256, version: str = "") -> None:
        self.loaded = Loaded(bundle, version, identity(bundle))
        self.tokenizer = bundle.tokenizer
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.counts = Counts()
        self.running = 0
        self._waiting: deque[Ticket] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="rlchat-engine", daemon=True)
        self._thread.start()

    def swap(self, bundle: PolicyBundle, version: str) -> None:
        """Tickets that are submitted from now on are for the model of ``bundle``; all others keep their model.

        Raises:
            ValueError: its tokenizer is another one.
        """
        if bundle.tokenizer.vocab_size != self.tokenizer.vocab_size:
            raise ValueError("a version has another tokenizer than the model before")
        with self._changed:
            self.loaded = Loaded(bundle, version, identity(bundle))

    @property
    def waiting(self) -> int:
        """Number of queued tickets."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the engine accepts and generates tickets."""
        return self._thread.is_alive() and not self._closing

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all ``tickets``. Raises :class:`EngineFullError`, and queues none, if there is no room for all."""
        with self._changed:
            if self._closing or self.running + self.waiting + len(tickets) > self.max_rows + self.max_waiting:
                raise EngineFullError(f"the queue is full with {self.waiting} waiting responses")
            for ticket in tickets:
                ticket.loaded = ticket.loaded or self.loaded
            self._waiting.extend(tickets)
            self._changed.notify()

    def run(self, job: Callable[[], Any]) -> Future[Any]:
        """Call ``job`` in the engine's thread, between two tokens: only that thread uses the model.

        Raises :class:`EngineFullError` if too many jobs are waiting.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closing or len(self._jobs) >= self.max_waiting:
                raise EngineFullError(f"the queue is full with {len(self._jobs)} waiting requests")
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Abort all responses and wait until the thread has stopped."""
        self.abort()
        self._thread.join()

    def abort(self) -> None:
        """Abort all responses and let the thread stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _work(self) -> None:
        batches: list[_Batch] = []  # one per model, the oldest first
        while not self._closing:
            if not batches:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._jobs or self._closing)
            self._run_jobs()
            self._begin_batches(batches)
            for batch in batches:
                self._advance(batch, batches)
            batches = [batch for batch in batches if batch.rows]
        for batch in batches:
            batch.fail()
        for ticket in self._waiting:
            _Row(ticket, self.tokenizer, 0).finish("failed")
        _wake(self._waiting)
        for _, future in self._jobs:
            future.set_exception(EngineFullError("the engine has stopped"))

    def _begin_batches(self, batches: list[_Batch]) -> None:
        """Adds a batch for each model that has none and for which tickets wait."""
        with self._changed:
            wanted = dict.fromkeys(ticket.loaded for ticket in self._waiting if ticket.loaded is not None)
        running = {batch.loaded for batch in batches}
        batches += [_Batch(loaded, self.tokenizer) for loaded in wanted if loaded not in running]

    def _advance(self, batch: _Batch, batches: Sequence[_Batch]) -> None:
        """The next token of each row of ``batch``. If that fails, its responses have failed, and it is empty."""
        try:
            self.counts.cancelled += batch.drop_ended()
            joining = self._take(batch) if batch.takes_rows else []
            if batch.rows or joining:
                batch.step(joining)
                self.counts.steps += 1
                self.counts.generated_tokens += len(batch.rows)
        except Exception:  # report any error to the waiting clients, and keep serving
            log.exception("generation failed")
            batch.fail()
        self.running = sum(not row.over for one in batches for row in one.rows)

    def _run_jobs(self) -> None:
        """Run one waiting job, so that jobs and tokens alternate."""
        if self._jobs and not self._closing:
            job, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:  # reported to the caller
                    future.set_exception(error)

    def _take(self, batch: _Batch) -> list[_Row]:
        """Take waiting tickets for the model of ``batch``; remove cancelled and expired ones from the queue."""
        now = time.monotonic()
        with self._changed:
            taken: list[_Row] = []
            expired: list[Ticket] = []
            left: deque[Ticket] = deque()
            for ticket in self._waiting:
                if ticket.cancelled:
                    self.counts.cancelled += 1
                elif now > ticket.deadline:
                    expired.append(ticket)
                elif ticket.loaded is batch.loaded and self.running + len(taken) < self.max_rows:
                    taken.append(_Row(ticket, self.tokenizer, batch.position))
                    self.counts.prompt_tokens += len(ticket.prompt)
                else:
                    left.append(ticket)
            self._waiting = left
            self.running += len(taken)
        for ticket in expired:
            _Row(ticket, self.tokenizer, batch.position).finish("expired")
        _wake(expired)
        return taken


class _Batch:
    """Rows that one model generates together. ``position`` is that of the next token."""

    def __init__(self, loaded: Loaded, tokenizer: ChatTokenizer) -> None:
        self.loaded = loaded
        self.rows: list[_Row] = []
        self.position = 0
        self._tokenizer = tokenizer
        self._device = loaded.bundle.model.backbone.head_weight.device
        self._can_append = can_append(loaded.bundle.model.backbone.new_cache())
        self._steps: Generator[Step, Change | None, None] | None = None
        self._keep: list[int] = []  # the rows that stay, by their number at the last token
        self._rows_then = 0  # their number at the last token
        self._logits = torch.empty(0)  # of the last step

    @property
    def takes_rows(self) -> bool:
        """Whether rows can join now."""
        return self._can_append or self._steps is None

    def drop_ended(self) -> int:
        """Let rows that are over leave the batch. Returns the number of cancelled ones."""
        cancelled = sum(row.abandoned for row in self.rows)
        self._keep = [number for number, row in enumerate(self.rows) if not row.over]
        self.rows = [self.rows[number] for number in self._keep]
        return cancelled

    def step(self, joining: list[_Row]) -> None:
        """Generate and deliver the next token of each row; the rows ``joining`` are in the batch from now on."""
        self.rows += joining
        if self._steps is None:
            self._steps = self._begin()
            step = next(self._steps)
        else:
            change = None
            if joining or len(self._keep) < self._rows_then:
                prompts = [row.ticket.prompt for row in joining]
                change = Change(self._keep, prompts, [row.ticket.sampling for row in self.rows], _uniforms(self.rows))
            step = self._steps.send(change)
        self.position += 1
        self._rows_then = len(self.rows)
        for row, token, one in zip(self.rows, step.tokens.tolist(), self._describe(step.tokens), strict=True):
            row.push(token, one)
        _wake(row.ticket for row in self.rows if row.over or row.ticket.streams)

    def fail(self) -> None:
        """End all responses with an error."""
        for row in self.rows:
            row.finish("failed")
        _wake(row.ticket for row in self.rows)
        self.rows = []

    def _begin(self) -> Generator[Step, Change | None, None]:
        ids, mask = pad([row.ticket.prompt for row in self.rows], self._tokenizer.pad_id, "left")
        return sample(
            self.loaded.bundle.model,
            ids.to(self._device),
            mask.to(self._device),
            [row.ticket.sampling for row in self.rows],
            _uniforms(self.rows),
            end_id=self._tokenizer.end_id,
            pad_id=self._tokenizer.pad_id,
            observe=self._observe,
        )

    def _observe(self, logits: Tensor) -> None:
        self._logits = logits

    def _describe(self, tokens: Tensor) -> list[TokenLogprob | None]:
        """The log-probs of ``tokens`` [rows] for the rows that ask for them."""
        described: list[TokenLogprob | None] = [None] * len(self.rows)
        wanted = [number for number, row in enumerate(self.rows) if row.ticket.logprobs is not None]
        if wanted:
            tops = [self.rows[number].ticket.logprobs or 0 for number in wanted]
            found = token_logprobs(self._logits[wanted], tokens[wanted], max(tops))
            for number, one, top in zip(wanted, found, tops, strict=True):
                described[number] = one._replace(top=one.top[:top])
        return described


def _wake(tickets: Iterable[Ticket]) -> None:
    for wake in {ticket.wake for ticket in tickets}:
        wake()


def _uniforms(rows: Sequence[_Row]) -> Uniforms:
    seeds = torch.tensor([row.ticket.seed for row in rows], dtype=torch.long)
    choices = torch.tensor([row.ticket.choice for row in rows], dtype=torch.long)
    begun = torch.tensor([row.begun for row in rows], dtype=torch.long)
    return addressed_uniforms(seeds, _STREAM, choices, begun)


class _Row:
    """A ticket in the batch. ``begun`` is the position of its first token."""

    def __init__(self, ticket: Ticket, tokenizer: ChatTokenizer, begun: int) -> None:
        self.ticket = ticket
        self.begun = begun
        self.over = False
        self.abandoned = False
        self._end_id = tokenizer.end_id
        self._decoder = tokenizer.stream()
        self._stop = StopStrings(ticket.stop)
        self._text = ""  # not delivered yet
        self._passed = 0  # characters that the stop strings have let pass
        self._decoded = 0  # characters that were decoded
        self._logprobs: deque[tuple[int, TokenLogprob]] = deque()  # not delivered; after how many decoded characters
        self._tokens = 0

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Add the next token; set ``over`` if it was the last or the ticket is cancelled."""
        if self.ticket.cancelled:
            self.over = self.abandoned = True
            return
        self._tokens += 1
        ended = token == self._end_id
        if logprob is not None:
            self._logprobs.append((self._decoded, logprob))
        decoded = self._decoder.finish() if ended else self._decoder.push(token)
        self._decoded += len(decoded)
        self._add(self._stop.push(decoded))
        if ended or self._stop.found:
            self.finish("stop")
        elif self._tokens == self.ticket.sampling.max_new_tokens or time.monotonic() > self.ticket.deadline:
            self.finish("length")
        elif self.ticket.streams and self._text:
            self._deliver(None)

    def finish(self, why: Finish) -> None:
        """Deliver the rest of the response, unless it is over."""
        if not self.over:
            self.over = True
            self._add(self._stop.finish())
            self._deliver(why)

    def _add(self, text: str) -> None:
        self._text += text
        self._passed += len(text)

    def _deliver(self, finish: Finish | None) -> None:
        """Deliver the text that has passed, and the log-probs of the tokens that begin in it.

        Tokens of text that is held back wait. Tokens that begin at or after a stop string are never delivered.
        """
        rest = finish is not None and not self._stop.found
        logprobs = []
        while self._logprobs and (rest or self._logprobs[0][0] < self._passed):
            logprobs.append(self._logprobs.popleft()[1])
        text, self._text = self._text, ""
        self.ticket.deliver(Piece(text, self._tokens, finish, tuple(logprobs)))
