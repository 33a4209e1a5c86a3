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

from benchmarks.learn_while_chatting.real.user import PREFERENCES, Preference, accepts, verdict
from rlchat.chat.feedback import append_feedback
from rlchat.chat.learning.settings import Bounds, Training
from rlchat.demo.real.base import find_base_model
from rlchat.demo.real.measure import Sampled, is_correct, mean_kl, perplexity, read_data, sample_replies
from rlchat.learn.gate import judge
from rlchat.learn.learner import Outcome, Request, learn
from rlchat.learn.measure import respond
from rlchat.models.model_file import PolicyBundle, identity, load_policy, save_bundle
from rlchat.models.sampling import Sampling
from rlchat.rewards import words
from rlchat.training.initial_model import open_policy
from rlchat.utils.files import write_atomically

SEEDS = (0, 1, 2)
VERDICTS = (8, 25)
MAX_LENGTH = 256
JUDGED = Sampling(max_new_tokens=64, temperature=0.7)
"""How the responses are sampled that the user judges: at the temperature of a chat."""
TRAINING = Training()  # the defaults, which are LoRA for a model of this size
BOUNDS = Bounds(control_drop=0.05, kl=0.2)
"""The preference is about all responses, so that the KL has to rise; one control is 2 points."""
_REPLAYED = ("train.jsonl", "facts.jsonl")  # packaged with `rlchat demo --real`; disjoint from what is measured
_SPLIT = {"val_fraction": 0.2, "test_fraction": 0.2}  # of the replayed files: two fifths are for the gate
_KL_PROMPTS = 32


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


def all_pieces(
    seeds: Sequence[int] = SEEDS, verdicts: Sequence[int] = VERDICTS, preferences: Sequence[Preference] = ("short",)
) -> list[Piece]:
    """All runs, first the one without verdicts, then those with the fewest."""
    return [Piece(0)] + [Piece(n, preference, seed) for preference in preferences for n in verdicts for seed in seeds]


def base_model(path: Path) -> Path:
    """The model file of SmolLM2-135M-Instruct at ``path``, which is written if it does not exist.

    Raises:
        UserError: a package is missing.
    """
    if not path.exists():
        bundle = open_policy(str(find_base_model()), None, MAX_LENGTH, None, None)
        bundle.about["data"] = _SPLIT  # as if it had been trained on the replayed files
        save_bundle(path, bundle)
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
        about |= {"options": asdict(TRAINING), "bounds": asdict(BOUNDS)}
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


def figures_of(greedy: Sequence[Sampled], control: Sequence[Sampled]) -> dict[str, Any]:
    """The share of replies as the user wants, by preference, words per reply, and right answers to questions."""
    return {
        "taught": {p: mean(accepts(p, sample.reply) for sample in greedy) for p in PREFERENCES},
        "words": mean(len(words(sample.reply.text)) for sample in greedy),
        "correct": sum(is_correct(sample) for sample in control),
        "controls": len(control),
    }


def _figures(policy: PolicyBundle, base: PolicyBundle, seed: int) -> dict[str, Any]:
    """What is reported of ``policy``, on prompts that neither training nor the gate uses; ``base`` is the original."""
    held_out = read_data("held_out.jsonl")
    greedy = sample_replies(policy, held_out, temperature=0.0)
    control = sample_replies(policy, read_data("control.jsonl"), temperature=0.0)
    kl = 0.0
    if policy is not base:
        kl = mean_kl(policy, base, sample_replies(policy, held_out[:_KL_PROMPTS], temperature=1.0, seed=seed))
    replies = [{"prompt": s.prompt.messages[-1].text, "reply": s.reply.text} for s in greedy]
    return {**figures_of(greedy, control), "perplexity": perplexity(policy, held_out), "kl": kl, "replies": replies}


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
            training=replace(TRAINING, seed=piece.seed),
            bounds=BOUNDS,
            device="cpu",
        )
        began = _cpu_seconds()
        outcome = learn(request)
        seconds = _cpu_seconds() - began
        # A rejected version is measured too: it is what there would be without the gate.
        found = _figures(outcome.policy, base, piece.seed)
    names = ("reasons", "notes", "before", "after", "feedback", "training", "seconds")
    gate = {name: outcome.figures[name] for name in names}
    return {
        "counts": counts,
        "accepted": outcome.decision.accepted,
        "accepted_by_default": _default_gate(outcome),
        "figures": found,
        "round_cpu_seconds": round(seconds, 1),
        "gate": gate,
    }


def _default_gate(outcome: Outcome) -> bool:
    """Whether the gate would accept the version with its default bounds too."""
    alarms = [reason for reason in outcome.decision.reasons if reason.startswith("alarm")]
    return judge(outcome.original, outcome.current, outcome.new, Bounds(), "", alarms).accepted


def _loaded(model: Path) -> PolicyBundle:
    bundle = load_policy(model, torch.device("cpu"))
    bundle.model.eval()
    return bundle


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
