"""The runs of the benchmark with a real chat model, each stored in a file of its own, and what is measured in one."""

from __future__ import annotations

import json
import random
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.learn_while_chatting.real.user import Preference, accepts, verdict
from rlchat.chat.feedback import append_feedback
from rlchat.conversation import Conversation
from rlchat.demo.real.base import find_base_model
from rlchat.demo.real.measure import Measured, is_correct, mean_kl, measure, read_data
from rlchat.learn.learner import Request, learn
from rlchat.learn.measure import respond
from rlchat.learn.stages import Training
from rlchat.models.model_file import PolicyBundle, identity, load_policy, save_bundle
from rlchat.models.sampling import Sampling
from rlchat.rewards import words
from rlchat.training.initial_model import open_policy
from rlchat.utils.files import write_atomically

SEEDS = (0, 1, 2)
VERDICTS = (8, 25, 50)
MAX_LENGTH = 256
JUDGED = Sampling(max_new_tokens=64, temperature=0.7)
"""How the responses are sampled that the user judges: at the temperature of a chat."""
TRAINING = Training(part="lora", passes=4)
REPLAY_PROMPTS = 32
_REPLAYED = ("train.jsonl", "facts.jsonl")  # packaged with `rlchat demo --real`; disjoint from what is measured


@dataclass(frozen=True, slots=True)
class Piece:
    """One run of the learner.

    Attributes:
        verdicts: how many; without any, the model is only measured.
        preference: of the user.
        seed: of the prompts, of the responses that are judged, and of the learner.
    """

    verdicts: int
    preference: Preference = "short"
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        return f"{self.preference}-{self.verdicts}-seed{self.seed}" if self.verdicts else "start"


def all_pieces(seeds: Sequence[int] = SEEDS, preferences: Sequence[Preference] = ("short",)) -> list[Piece]:
    """All runs, first the one without verdicts, then one seed after the other."""
    return [Piece(0)] + [Piece(n, preference, seed) for preference in preferences for seed in seeds for n in VERDICTS]


def base_model(path: Path) -> Path:
    """The model file of SmolLM2-135M-Instruct at ``path``, which is written if it does not exist.

    Raises:
        UserError: a package is missing.
    """
    if not path.exists():
        save_bundle(path, open_policy(str(find_base_model()), None, MAX_LENGTH, None, None))
    return path


def run(piece: Piece, model: Path, folder: Path) -> dict[str, Any]:
    """The figures of ``piece``, from its file in ``folder`` if it has been run, else measured and written there.

    Raises:
        SystemExit: the file is of another model, or of other options.
    """
    base = _loaded(model)
    path = folder / f"{piece.name}.json"
    about = {**asdict(piece), "model": identity(base)}
    if piece.verdicts:
        about |= {"training": asdict(TRAINING), "replay_prompts": REPLAY_PROMPTS}
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in about} != about:
            raise SystemExit(f"{path} is of another model or version of this benchmark: pass another --out")
        return found
    began = _cpu_seconds()
    measured = _learned(piece, base, model) if piece.verdicts else {"figures": _figures(base, base, piece.seed)}
    figures = {**about, **measured, "cpu_seconds": round(_cpu_seconds() - began, 1)}
    text = json.dumps(figures, ensure_ascii=False, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return figures


def give_feedback(piece: Piece, model: PolicyBundle, name: str, path: Path) -> dict[str, int]:
    """Writes the verdicts of the user on responses of ``model`` to ``path``; returns their numbers by kind.

    The prompts are packaged training prompts of the demo. Those of fewer verdicts are among those of more.
    """
    prompts = read_data("train.jsonl")
    asked = random.Random(f"verdicts {piece.seed}").sample(prompts, len(prompts))[: piece.verdicts]
    counts: dict[str, int] = {}
    for prompt, reply in zip(asked, respond(model, asked, JUDGED, piece.seed), strict=True):
        found = verdict(piece.preference, reply)
        append_feedback(path, prompt, reply.text or "…", found, model=name, model_id=identity(model))
        kind = found if isinstance(found, str) else "corrected"
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def figures_of(measured: Measured, preferences: Sequence[Preference]) -> dict[str, Any]:
    """The share of replies as the user wants by preference, right answers, words per reply, and the perplexity."""
    return {
        "taught": {p: mean(accepts(p, sample.reply) for sample in measured.greedy) for p in preferences},
        "taught_sampled": {p: mean(accepts(p, sample.reply) for sample in measured.sampled) for p in preferences},
        "correct": sum(is_correct(sample) for sample in measured.control),
        "controls": len(measured.control),
        "words": mean(len(words(sample.reply.text)) for sample in measured.greedy),
        "perplexity": measured.perplexity,
    }


def _figures(policy: PolicyBundle, base: PolicyBundle, seed: int) -> dict[str, Any]:
    """What is reported of ``policy``, on prompts that neither training nor the gate uses; ``base`` is the original."""
    measured = measure(policy, read_data("held_out.jsonl"), read_data("control.jsonl"), seed=seed)
    kl = 0.0 if policy is base else mean_kl(policy, base, measured.sampled)
    replies = [{"prompt": s.prompt.messages[-1].text, "reply": s.reply.text} for s in measured.greedy]
    return {**figures_of(measured, ("short", "thanks")), "kl": kl, "replies": replies}


def _learned(piece: Piece, base: PolicyBundle, model: Path) -> dict[str, Any]:
    data = files("rlchat.demo.real") / "data"
    with tempfile.TemporaryDirectory(prefix="rlchat-learn-") as folder, as_file(data) as replay:
        feedback = Path(folder, "feedback.jsonl")
        counts = give_feedback(piece, base, model.name, feedback)
        request = Request(
            model=model,
            feedback=feedback,
            out=Path(folder, "versions"),
            replay=[str(replay / name) for name in _REPLAYED],
            replay_prompts=REPLAY_PROMPTS,
            training=replace(TRAINING, seed=piece.seed),
            device="cpu",
        )
        began = _cpu_seconds()
        outcome = learn(request)
        seconds = _cpu_seconds() - began
        # A rejected version is measured too: it is what there would be without the gate.
        found = _figures(outcome.policy, base, piece.seed)
    gate = {name: outcome.figures[name] for name in ("reasons", "notes", "before", "after", "feedback", "seconds")}
    return {
        "counts": counts,
        "accepted": outcome.decision.accepted,
        "figures": found,
        "round_cpu_seconds": round(seconds, 1),
        "gate": gate,
    }


def _loaded(model: Path) -> PolicyBundle:
    bundle = load_policy(model, torch.device("cpu"))
    bundle.model.eval()
    return bundle


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
