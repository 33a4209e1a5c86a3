"""The runs of the benchmark, each stored in a file of its own, and what is measured in one."""

from __future__ import annotations

import json
import random
import resource
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.learn_while_chatting.user import Asked, Form, Preference, User
from rlchat.chat import ChatInterface
from rlchat.chat.feedback import append_feedback
from rlchat.chat.learning.settings import Method, Training
from rlchat.conversation import Conversation, Message
from rlchat.learn.learner import Request, learn
from rlchat.models.model_file import identity, save_bundle
from rlchat.utils.files import write_atomically

_NEW_TOKENS = 24
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Piece:
    """One run of the learner, or of one after another.

    Attributes:
        verdicts: how many; without any, the model is only measured.
        preference: of the user.
        method: of the learner.
        form: edits or thumbs.
        wrong: the probability that a verdict is wrong.
        every: 0: the learner runs once, on all verdicts. Otherwise it runs after each ``every`` of them, as in
            `rlchat serve --learn`, and the verdicts that follow are on the responses of the version in use.
        seed: of the user, of the model's responses to it, and of the learner.
    """

    verdicts: int
    preference: Preference = "facts"
    method: Method = "dpo"
    form: Form = "edits"
    wrong: float = 0.0
    every: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        if not self.verdicts:
            return f"{self.preference}-start-seed{self.seed}"
        parts = [self.preference, self.method, self.form, f"wrong{self.wrong:g}", self.verdicts, f"seed{self.seed}"]
        if self.every:
            parts.insert(-1, f"every{self.every}")
        return "-".join(map(str, parts))


def all_pieces(seeds: Sequence[int] = SEEDS) -> list[Piece]:
    """All runs, the most telling ones first."""
    groups: list[list[dict[str, Any]]] = [
        [{"verdicts": 0}, {"verdicts": 200}, {"verdicts": 200, "wrong": 0.3}, {"verdicts": 200, "wrong": 0.5}],
        [{"verdicts": n} for n in (8, 25, 50, 100, 500)],
        [{"verdicts": 200, "wrong": wrong} for wrong in (0.1, 1.0)],
        [{"verdicts": n, "method": "ppo"} for n in (8, 50, 200)],
        [{"verdicts": n, "form": "thumbs"} for n in (50, 200, 500)],
        [{"verdicts": n, "preference": "politeness"} for n in (0, 8, 50, 200)],
        [{"verdicts": n, "preference": "shortness"} for n in (0, 8, 50, 200)],
        [{"verdicts": n, "preference": "shortness", "form": "thumbs"} for n in (50, 200, 500)],
        [{"verdicts": 200, "every": 25, **more} for more in ({}, {"form": "thumbs"}, {"wrong": 0.3}, {"wrong": 0.5})],
        [{"verdicts": 200, "method": "ppo", "wrong": wrong} for wrong in (0.3, 0.5)],
        [{"verdicts": 200, "preference": "shortness", "form": "thumbs", "method": "ppo"}],
        [{"verdicts": 200, "preference": "shortness", "form": "thumbs", "wrong": wrong} for wrong in (0.3, 0.5)],
    ]
    return [Piece(**options, seed=seed) for group in groups for seed in seeds for options in group]


def run(piece: Piece, model: Path, data: str, folder: Path) -> dict[str, Any]:
    """The figures of ``piece``, from its file in ``folder`` if it has been run, else measured and written there.

    Raises:
        SystemExit: the file is of another model.
    """
    chat = ChatInterface(model, device="cpu", seed=piece.seed)
    path, about = folder / f"{piece.name}.json", {**asdict(piece), "model": identity(chat.bundle)}
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in about} != about:
            raise SystemExit(f"{path} is of another model or version of this benchmark: pass another --out")
        return found
    began = resource.getrusage(resource.RUSAGE_SELF)
    user = User(piece.preference, piece.seed)
    if not piece.verdicts:
        measured: dict[str, Any] = {"gold": gold(user, chat)}
    elif piece.every:
        measured = _chained(piece, user, chat, model, data)
    else:
        measured = _learned(piece, user, chat, model, data)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    figures = {**about, **measured, "cpu_seconds": round(seconds, 1)}
    text = json.dumps(figures, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return figures


def gold(user: User, chat: ChatInterface) -> dict[str, float]:
    """The share of held-out questions that ``chat`` answers as ``user`` wants, at temperature 0 and 1."""
    found = {}
    for side, asked in (("taught", user.held_out_taught), ("others", user.held_out_others)):
        for name, temperature in (("", 0.0), ("_sampled", 1.0)):
            responses = _responses(chat, asked, temperature)
            accepted = sum(user.accepts(one, response) for one, response in zip(asked, responses, strict=True))
            found[side + name] = accepted / len(asked)
    return found


def give_feedback(
    piece: Piece, user: User, chat: ChatInterface, path: Path, asked: Sequence[Asked], rng: random.Random
) -> Counter[str]:
    """Adds the verdicts of ``user`` on sampled responses of ``chat`` to ``path``; returns their numbers by kind."""
    counts: Counter[str] = Counter(wrong=0)
    for one, response in zip(asked, _responses(chat, asked, 1.0), strict=True):
        wrong = rng.random() < piece.wrong
        verdict = user.verdict(one, response or "…", piece.form, rng, wrong=wrong)
        prompt = Conversation((Message("user", one.text),))
        name, model_id = chat.model_path.name, identity(chat.bundle)
        append_feedback(path, prompt, response or "…", verdict, model=name, model_id=model_id)
        counts[verdict if isinstance(verdict, str) else "corrected"] += 1
        counts["wrong"] += wrong
    return counts


def _responses(chat: ChatInterface, asked: Sequence[Asked], temperature: float) -> list[str]:
    replies = chat.batch([one.text for one in asked], _NEW_TOKENS, temperature, batch_size=128)
    return [reply.strip() for reply in replies]


def _learned(piece: Piece, user: User, chat: ChatInterface, model: Path, data: str) -> dict[str, Any]:
    """The learner runs once. A rejected version is measured too: it is what there would be without the gate."""
    rng = _rng(piece)
    with tempfile.TemporaryDirectory(prefix="rlchat-learn-") as folder:
        feedback, version = Path(folder, "feedback.jsonl"), Path(folder, "version.pt")
        counts = give_feedback(piece, user, chat, feedback, user.asks(piece.verdicts, rng), rng)
        outcome = learn(_request(piece, model, Path(folder), data))
        save_bundle(version, outcome.policy)
        found = gold(user, ChatInterface(version, device="cpu", seed=piece.seed))
    figures = {name: outcome.figures[name] for name in ("reasons", "original", "before", "after")}
    return {"counts": counts, "accepted": outcome.decision.accepted, "gold": found, **figures}


def _chained(piece: Piece, user: User, chat: ChatInterface, model: Path, data: str) -> dict[str, Any]:
    """The learner runs after each ``every`` verdicts, and an accepted version is in use from then on."""
    rng = _rng(piece)
    asked = user.asks(piece.verdicts, rng)
    counts: Counter[str] = Counter()
    rounds: list[dict[str, Any]] = []
    in_use, found = None, gold(user, chat)
    with tempfile.TemporaryDirectory(prefix="rlchat-learn-") as folder:
        for start in range(0, piece.verdicts, piece.every):
            some = asked[start : start + piece.every]
            counts += give_feedback(piece, user, chat, Path(folder, "feedback.jsonl"), some, rng)
            outcome = learn(_request(piece, model, Path(folder), data, current=in_use))
            if outcome.path is not None:
                in_use = outcome.path
                chat = ChatInterface(in_use, device="cpu", seed=piece.seed)
                found = gold(user, chat)
            figures = {name: outcome.figures[name] for name in ("accepted", "reasons", "before", "after")}
            rounds.append({"verdicts": start + len(some), "gold": found, **figures})
    return {"counts": counts, "rounds": rounds, "gold": found}


def _rng(piece: Piece) -> random.Random:
    return random.Random(f"verdicts {piece.seed}")


def _request(piece: Piece, model: Path, folder: Path, data: str, current: Path | None = None) -> Request:
    return Request(
        model=model,
        feedback=folder / "feedback.jsonl",
        out=folder / "versions",
        current=current,
        replay=(data,),
        training=Training(method=piece.method, seed=piece.seed),
        device="cpu",
    )
