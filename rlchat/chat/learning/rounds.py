"""One round: `rlchat learn` as a process of its own, and what came of it."""

from __future__ import annotations

import heapq
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlchat.chat.versions import Versions
from rlchat.errors import UserError, counted, says_no_memory

LEARN = (sys.executable, "-m", "rlchat", "learn")
"""The command of a round, without its arguments."""

_LAST_BYTES = 4_000  # of the log, in which the reason of a failure is


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a round, from the figures that it has written.

    Attributes:
        number: the number of the accepted version; None if it was rejected.
        reasons: why it was rejected.
        notes: what the gate did not measure.
        date: when, in ISO 8601.
        verdicts: the number of verdicts that it used.
        before, after: the measures of the version in use and of the new one, as in the figures.
        seconds: the time of the whole round.
        feedback_file: the name of the file of verdicts that it has read.
        left_out: how many verdicts it could not use, by reason.
        kinds: how many of the verdicts were good, bad and corrected.
        model_id: the :func:`rlchat.models.model_file.identity` of the original model; empty in older figures.
    """

    number: int | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    date: str
    verdicts: int
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    feedback_file: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    model_id: str = ""

    @property
    def sentence(self) -> str:
        """The outcome in one sentence, without a full stop."""
        if self.number is None:
            return f"rejected: {'; '.join(self.reasons)}"
        changes = []
        if self.after.get("agrees") is not None:
            now, of, before = self.after["agrees"], self.after.get("verdicts"), self.before.get("agrees")
            changes.append(f"agrees with {now} of {of} held-back verdicts, before: {before}")
        if self.after.get("correct") is not None:
            changes.append(self._controls)
        learned = f"version {self.number} has learned from {self.learned_from}"
        return ": ".join([learned, *(["; ".join(changes)] if changes else [])])

    @property
    def learned_from(self) -> str:
        """The verdicts that it used, as in ``3 verdicts (1 good, 2 corrected)``."""
        kinds = ", ".join(f"{self.kinds[kind]} {kind}" for kind in ("good", "bad", "corrected") if self.kinds.get(kind))
        return counted(self.verdicts, "verdict") + (f" ({kinds})" if kinds else "")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was left out and what the gate did not measure, as clauses."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)
        return (*([f"left out: {left_out}"] if left_out else []), *self.notes)

    @property
    def _controls(self) -> str:
        """The correct controls of an accepted version. They may have fallen, but not by more than the gate allows."""
        now, of, before = self.after["correct"], self.after.get("controls"), self.before.get("correct")
        has_fallen = isinstance(now, int) and isinstance(before, int) and now < before
        return f"{now} of {of} controls are correct, before: {before}{', which is within the bound' * has_fallen}"


def arguments_of(model: Path, feedback: Path, current: Path | None, memory: float) -> list[str]:
    """The arguments of a round in the background: what it learns for and from, and its ``memory`` in GiB, 0: no limit.

    ``current`` is the version in use; None: the original model.
    """
    words = [str(model), "--feedback", str(feedback), "--on-bad-line", "skip", "--threads", "1", "--background"]
    words += ["--max-memory", f"{memory:g}"] if memory else []
    return words + (["--current", str(current)] if current is not None else [])


class Round:
    """A round that runs: `rlchat learn` at low priority. It ends when this process ends, however that happens.

    Args:
        command: :data:`LEARN`, or a program that takes the same arguments.
        arguments: of the command, without those that follow from being a child.
        log: the file for its output, which is replaced.
        scratch: a folder for its temporary files, which is emptied.

    Raises:
        UserError: a file cannot be written, or the process cannot be started.
    """

    def __init__(self, command: Sequence[str], arguments: Sequence[str], log: Path, scratch: Path) -> None:
        self.since = time.time()
        self.log = log
        self._began = time.monotonic()
        environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch.absolute()))}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        shutil.rmtree(scratch, ignore_errors=True)
        words = [*command, *arguments]
        try:
            scratch.mkdir(parents=True)
            with log.open("wb") as output:
                # `--background` ends when this pipe is closed, also by the end of this process.
                self._process = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, **_apart()
                )
        except OSError as error:
            raise UserError(f"{log.parent}: a round of learning cannot begin here: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._began

    def stop(self) -> None:
        """Ends the process at once. It leaves a version completely written, or files that are cleaned up later."""
        self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Closes the pipe of a process that has ended."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def failure(self) -> str:
        """Why the process has ended without an outcome, in one sentence without a full stop."""
        code = self._process.returncode
        try:
            text = self.log.read_bytes()[-_LAST_BYTES:].decode(errors="replace")
        except OSError:
            text = ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if code == 2 and lines:
            return lines[-1].removeprefix("rlchat: ").rstrip(".")
        if says_no_memory(text):
            return f"learning needs more memory than it may use; raise --learn-memory, or see {self.log}"
        if code is not None and code < 0:
            killed = f"learning was ended by signal {-code}"
            return killed + (", as the system does when memory runs out" if code == -9 else f"; see {self.log}")
        return f"learning failed with exit code {code}; see {self.log}"


def _apart() -> dict[str, Any]:
    """Arguments of Popen for a process that Ctrl-C in the terminal does not reach.

    It stays in the session: with autogroups, Linux shares the processors among sessions first, and a low priority
    counts only within one.
    """
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.BELOW_NORMAL_PRIORITY_CLASS}
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def outcomes(versions: Versions) -> list[Outcome]:
    """All outcomes whose figures are in the folder of ``versions``, the oldest first. Damaged figures are left out.

    Accepted versions are in the order of their numbers and rejected ones in that of their lines, also if the clock was
    set back; dates decide only between the two.
    """
    accepted = sorted(_whole(_numbered_figures(versions)), key=lambda outcome: outcome.number or 0)
    return list(heapq.merge(accepted, _whole(_rejected_figures(versions)), key=lambda outcome: outcome.date))


def _numbered_figures(versions: Versions) -> Iterator[Any]:
    for path in versions.folder.glob("*.json"):
        if path.stem.isdigit():
            yield _parsed(path)


def _rejected_figures(versions: Versions) -> Iterator[Any]:
    try:
        lines = (versions.folder / "rejected.jsonl").read_bytes().splitlines()
    except OSError:
        lines = []
    for line in lines:
        yield _parsed(line)


def _whole(all_figures: Iterator[Any]) -> list[Outcome]:
    return [outcome for figures in all_figures if (outcome := _outcome(figures)) is not None]


def _parsed(source: Path | bytes) -> Any:
    try:
        return json.loads(source if isinstance(source, bytes) else source.read_bytes())
    except (OSError, ValueError):
        return None


def _outcome(figures: Any) -> Outcome | None:
    """The outcome in ``figures``, in which everything may have any type; None if it is damaged."""
    try:
        accepted = figures["accepted"] is True
        before, after = (dict(figures.get(name) or {}) for name in ("before", "after"))
        return Outcome(
            number=int(figures["version"]) if accepted else None,
            reasons=tuple(map(str, figures.get("reasons") or ())),
            notes=tuple(map(str, figures.get("notes") or ())),
            date=str(figures["date"]),
            verdicts=int(figures["feedback"]["verdicts"]),
            before=before,
            after=after,
            seconds=float(sum((figures.get("seconds") or {}).values())),
            feedback_file=str(figures.get("feedback_file", "")),
            left_out={str(why): int(n) for why, n in (figures["feedback"].get("left_out") or {}).items()},
            kinds={str(kind): int(n) for kind, n in (figures["feedback"].get("kinds") or {}).items()},
            model_id=str(figures.get("model_id", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
