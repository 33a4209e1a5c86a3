"""`Engine`: replies to many at once.

One thread owns the model and keeps one batch going. A request joins it at the next token and leaves it when its reply
has ended, so nobody waits for somebody else's long reply; the tokens themselves come from
:func:`rlchat.models.sampling.sample`, as everywhere. Each reply has noise of its own, so that a seed gives the
same words alone and in a crowd.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from rlchat.models.kv_cache import can_append
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Change, Sampling, Step, Uniforms, addressed_uniforms, sample
from rlchat.server.stop_strings import StopStrings
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad

log = logging.getLogger("rlchat")

_STREAM = 0  # of addressed noise: a request's address is its seed and the number of its choice

Finish = Literal["stop", "length", "expired", "failed"]
"""Why nothing more comes: the reply closed its turn or reached a stop string; it ran out of tokens or of time; its time
was over before its first token; the engine broke."""


class EngineFullError(Exception):
    """As many wait as may; come again later."""


class Piece(NamedTuple):
    """Some text of a reply."""

    text: str
    tokens: int  # sampled so far, the end marker included
    finish: Finish | None = None  # None while more is to come


@dataclass(slots=True, eq=False)
class Ticket:
    """One reply that somebody waits for.

    ``deliver`` is called from the engine's thread: with each piece where it ``streams``, else once, with the whole
    text. ``deadline`` is a time of :func:`time.monotonic`. Whoever no longer wants it sets ``cancelled``.
    """

    prompt: Sequence[int]
    sampling: Sampling
    deliver: Callable[[Piece], None]
    deadline: float
    seed: int = 0
    choice: int = 0  # the number among replies to one request: each draws other noise
    stop: Sequence[str] = ()
    streams: bool = False
    cancelled: bool = False


@dataclass(slots=True)
class Counts:
    """What the engine has done since it began."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0  # of the model, each a token for every row
    cancelled: int = 0


class Engine:
    """Generates for ``max_rows`` tickets at a time and lets ``max_waiting`` wait; :meth:`close` ends it."""

    def __init__(self, bundle: PolicyBundle, *, max_rows: int = 64, max_waiting: int = 256) -> None:
        self.model = bundle.model
        self.tokenizer = bundle.tokenizer
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.counts = Counts()
        self.running = 0
        self._device = bundle.model.backbone.head_weight.device
        self._takes_rows_in = can_append(bundle.model.backbone.new_cache())
        self._waiting: deque[Ticket] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="rlchat-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many tickets have not begun."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether tickets are worked on."""
        return self._thread.is_alive() and not self._closing

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Puts all ``tickets`` in the queue, or none: raises :class:`EngineFullError` where there is no room."""
        with self._changed:
            if self._closing or self.running + self.waiting + len(tickets) > self.max_rows + self.max_waiting:
                raise EngineFullError(f"{self.waiting} replies wait for their turn already")
            self._waiting.extend(tickets)
            self._changed.notify()

    def close(self) -> None:
        """Breaks off what is running or waiting, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
            rows = self._take(0)
            try:
                if rows:
                    self._generate(rows)
            except Exception:  # whatever it is, those who wait must hear of it, and the next ones be served
                log.exception("generation failed")
            for row in rows:
                row.finish("failed")
            self.running = 0
        for ticket in self._waiting:
            _Row(ticket, self.tokenizer, 0).finish("failed")

    def _generate(self, rows: list[_Row]) -> None:
        """One batch, until it is empty; ``rows`` always holds those that are in it."""
        ids, mask = pad([row.ticket.prompt for row in rows], self.tokenizer.pad_id, "left")
        steps = sample(
            self.model,
            ids.to(self._device),
            mask.to(self._device),
            [row.ticket.sampling for row in rows],
            _noise(rows),
            end_id=self.tokenizer.end_id,
            pad_id=self.tokenizer.pad_id,
        )
        step: Step = next(steps)
        position = 0
        while True:
            position += 1
            self.counts.steps += 1
            self.counts.generated_tokens += len(rows)
            for row, token in zip(rows, step.tokens.tolist(), strict=True):
                row.push(token)
            self.counts.cancelled += sum(row.abandoned for row in rows)
            keep = [number for number, row in enumerate(rows) if not row.over]
            stay = [rows[number] for number in keep]
            self.running = len(stay)
            joining = self._take(position) if self._takes_rows_in else []
            change = None
            if joining or len(stay) < len(rows):
                rows[:] = stay + joining
                prompts = [row.ticket.prompt for row in joining]
                change = Change(keep, prompts, [row.ticket.sampling for row in rows], _noise(rows))
            if not rows or self._closing:
                return
            step = steps.send(change)

    def _take(self, position: int) -> list[_Row]:
        """Those who join at ``position`` of the batch; turns away whose time is over, forgets who went away."""
        now = time.monotonic()
        with self._changed:
            taken: list[_Row] = []
            left: deque[Ticket] = deque()
            for ticket in self._waiting:
                if ticket.cancelled:
                    self.counts.cancelled += 1
                elif now > ticket.deadline:
                    _Row(ticket, self.tokenizer, position).finish("expired")
                elif self.running + len(taken) < self.max_rows:
                    taken.append(_Row(ticket, self.tokenizer, position))
                    self.counts.prompt_tokens += len(ticket.prompt)
                else:
                    left.append(ticket)
            self._waiting = left
            self.running += len(taken)
            return taken


def _noise(rows: Sequence[_Row]) -> Uniforms:
    seeds = torch.tensor([row.ticket.seed for row in rows], dtype=torch.long)
    choices = torch.tensor([row.ticket.choice for row in rows], dtype=torch.long)
    begun = torch.tensor([row.begun for row in rows], dtype=torch.long)
    return addressed_uniforms(seeds, _STREAM, choices, begun)


class _Row:
    """A ticket in the batch: what its reply has said since the position at which it ``begun``."""

    def __init__(self, ticket: Ticket, tokenizer: ChatTokenizer, begun: int) -> None:
        self.ticket = ticket
        self.begun = begun
        self.over = False
        self.abandoned = False
        self._end_id = tokenizer.end_id
        self._decoder = tokenizer.stream()
        self._stop = StopStrings(ticket.stop)
        self._text = ""  # that was not delivered yet
        self._tokens = 0

    def push(self, token: int) -> None:
        """Takes the next token of the reply; it is ``over`` where that was the last, or nobody wants it any more."""
        if self.ticket.cancelled:
            self.over = self.abandoned = True
            return
        self._tokens += 1
        ended = token == self._end_id
        self._text += self._stop.push(self._decoder.finish() if ended else self._decoder.push(token))
        if ended or self._stop.found:
            self.finish("stop")
        elif self._tokens == self.ticket.sampling.max_new_tokens or time.monotonic() > self.ticket.deadline:
            self.finish("length")
        elif self.ticket.streams and self._text:
            self._deliver(None)

    def finish(self, why: Finish) -> None:
        """Delivers the rest of the reply, if it is not over already."""
        if not self.over:
            self.over = True
            self._text += self._stop.finish()
            self._deliver(why)

    def _deliver(self, finish: Finish | None) -> None:
        text, self._text = self._text, ""
        self.ticket.deliver(Piece(text, self._tokens, finish))
