"""One round of learning: verdicts and a model file in, an accepted or rejected version out."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rlchat.chat.learning.settings import Bounds, Training
from rlchat.chat.verdicts import FeedbackReport, JudgedResponse, namesake, read_verdicts
from rlchat.chat.versions import Versions, number_of
from rlchat.conversation import Conversation
from rlchat.errors import NonFiniteError, UserError, counted
from rlchat.learn.examples import fits, held, judged_prompts, rejected_texts, words_of
from rlchat.learn.gate import Decision, judge, kl_between
from rlchat.learn.held_back import split, trained_prompts
from rlchat.learn.measure import Figures, Yardstick, judged_responses, measure, questions_of, respond
from rlchat.learn.records import describe, finite, reward_with_model
from rlchat.learn.replay import Replay, data_of, everyday_replay, read_replay
from rlchat.learn.stages import Lesson, Trained, train
from rlchat.models.model_file import PolicyBundle, identity, load_policy, save_bundle
from rlchat.models.sampling import Sampling
from rlchat.utils.devices import choose_device

_MOST_CORRECTED = 0.05
_REPLAYED, _FEW_REPLAYED = 256, 32


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to learn from what.

    Attributes:
        model: the original model file, which is not changed.
        feedback: the file of verdicts.
        out: a file or a folder for the version; None: the folder of versions beside ``model``.
        current: the model file that the version would replace, for the gate; None: ``model``.
        replay: data files of the original training; empty: those that the model file names.
        replay_prompts: the largest number of training prompts that are replayed; None: 256, and 32 for DPO with LoRA.
        control_prompts: the largest number of held-out conversations, and of controls.
        any_model: whether verdicts on responses of other models count.
        on_bad_line: stop at a damaged line of ``feedback``, or skip it.
        training: how the version is trained.
        bounds: how much worse than the original it may be.
        device: cpu, cuda or mps; None: the fastest that is available.
        base_model: where the base of an adapter file is; None: as in training.
    """

    model: Path
    feedback: Path
    out: Path | None = None
    current: Path | None = None
    replay: Sequence[str] = ()
    replay_prompts: int | None = None
    control_prompts: int = 256
    any_model: bool = False
    on_bad_line: Literal["error", "skip"] = "error"
    training: Training = field(default_factory=Training)
    bounds: Bounds = field(default_factory=Bounds)
    device: str | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Attributes:
        decision: of the gate.
        number: the number of the accepted version; None if it was rejected, or is in a file that ``out`` names.
        path: its model file; None if it was rejected.
        figures: everything that was measured, as plain values, as written beside the versions.
        original, current, new: the figures of the three models.
        policy: the trained version, in memory, also if it was rejected.
    """

    decision: Decision
    number: int | None
    path: Path | None
    figures: dict[str, Any]
    original: Figures
    current: Figures
    new: Figures
    policy: PolicyBundle

    @property
    def last_line(self) -> str:
        """The outcome in one line."""
        if self.path is not None and self.number is None:
            return f"accepted as a version of {self.figures['model']}: {self.path}"
        if self.path is not None:
            return f"accepted as version {self.number}: {self.path}"
        return f"rejected: {'; '.join(self.decision.reasons)}"


def learn(request: Request, say: Callable[[str], object] = lambda line: None) -> Outcome:
    """Trains a version of the model on all verdicts that count, and accepts or rejects it.

    The version is trained from the original model each time, so a verdict that was taken back leaves no trace. ``say``
    is called with a line about each step.

    Raises:
        UserError: a file cannot be read or written; no verdict can be used; an option does not fit the model; the
            version in use is one of another model.
    """
    versions = Versions(request.model, request.out)
    device = choose_device(request.device)
    original = load_policy(request.model, device, request.base_model)
    current = None if request.current is None else load_policy(request.current, device)
    if current is not None and identity(current) != identity(original):
        raise UserError(
            f"--current {request.current} is not a version of {request.model}, but of another model; pass a version of "
            f"{request.model}, or leave out --current"
        )
    if isinstance(learned := original.about.get("learned"), dict):
        before = learned.get("from")
        say(f"{request.model} was learned from {before}: the KL penalty and the gate's bounds refer to {request.model}")
    with versions.locked():
        return _Round(request, versions, original, current, say).run()


def usable_verdicts(
    request: Request, versions: Versions, original: PolicyBundle
) -> tuple[list[JudgedResponse], FeedbackReport, Counter[str]]:
    """The verdicts that can be used, what was read, and how many verdicts were left out, by reason.

    Args:
        request: what to learn from what.
        versions: of the model.
        original: the model. Its versions have the same :func:`rlchat.models.model_file.identity`.

    Raises:
        UserError: the file cannot be read; no verdict can be used; the error says why.
    """
    model_id = identity(original)
    verdicts, report = read_verdicts(request.feedback, on_bad_line=request.on_bad_line)
    left_out: Counter[str] = Counter()
    usable, others = [], set()
    for verdict in verdicts:
        if not request.any_model and not _is_own(verdict, request, versions, model_id):
            same_name = verdict.model == request.model.name
            others.add(namesake(verdict.model) if same_name else verdict.model)
            left_out["on responses of other models"] += 1
        elif not fits(verdict, original.tokenizer, original.max_length):
            left_out[f"longer than max_length {original.max_length}"] += 1
        else:
            usable.append(verdict)
    if usable:
        return usable, report, left_out
    if others and len(verdicts) == left_out["on responses of other models"]:
        every = f"all {len(verdicts)} verdicts are" if len(verdicts) > 1 else "the only verdict is"
        raise UserError(
            f"{request.feedback}: {every} on responses of {', '.join(sorted(others))}, not of "
            f"{request.model.name}; pass the feedback of this model, or --any-model"
        )
    if verdicts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        none = f"none of {len(verdicts)} verdicts can" if len(verdicts) > 1 else "the only verdict cannot"
        raise UserError(f"{request.feedback}: {none} be used ({reasons})")
    raise UserError(
        f"{request.feedback}: no verdict that counts in {counted(report.lines - report.bad_lines, 'line')} "
        f"({report.withdrawn} taken back); rate or correct responses first"
    )


def _is_own(verdict: JudgedResponse, request: Request, versions: Versions, model_id: str) -> bool:
    """Whether ``verdict`` is on a response of the model or of one of its versions, which have the same ``model_id``.

    The file name decides only for verdicts without an id, which rlchat 0.1 wrote.
    """
    if verdict.model_id:
        return verdict.model_id == model_id
    in_use = request.current is not None and verdict.model == request.current.name
    return in_use or versions.owns(verdict.model)


def _highest(verdicts: Sequence[JudgedResponse]) -> int:
    """The highest number of a version that ``verdicts`` name; 0 without any. Files of these versions may be deleted.

    Only a verdict with an id counts: any client may name a version, but only a chat that knows it records an id.
    """
    return max((number_of(verdict.model) or 0 for verdict in verdicts if verdict.model_id), default=0)


def uncorrected(
    controls: list[Conversation], replies: Sequence[str], verdicts: Sequence[JudgedResponse]
) -> list[Conversation]:
    """``controls`` without those that the original model answers with the words of a corrected response.

    They would hold the version to what was corrected. Words with as many 👍 as corrections, on any prompt, are no
    reason: a few wrong corrections must not take right answers out. At most 5 % are left out, the answers with the most
    corrections first: wrong corrections must not hide what they break.

    Args:
        controls: prompts with checks.
        replies: the original model's responses to them.
        verdicts: all verdicts that count.
    """
    votes: Counter[str] = Counter()
    for verdict in verdicts:
        votes[words_of(verdict.response)] += (verdict.kind == "corrected") - (verdict.kind == "good")
    against = {i: votes[words_of(reply)] for i, reply in enumerate(replies) if votes[words_of(reply)] > 0}
    left_out = sorted(against, key=lambda i: -against[i])[: int(_MOST_CORRECTED * len(controls))]
    return [prompt for i, prompt in enumerate(controls) if i not in left_out]


class _Round:
    """One run of :func:`learn` on a loaded model."""

    def __init__(
        self,
        request: Request,
        versions: Versions,
        original: PolicyBundle,
        current: PolicyBundle | None,
        say: Callable[[str], object],
    ) -> None:
        self.request, self.versions, self.original, self.say = request, versions, original, say
        self.current = current  # None: the original
        self.training = request.training.for_model(original)
        few = self.training.method == "dpo" and self.training.part == "lora"  # of a large model; each needs a response
        self.replay_prompts = request.replay_prompts or (_FEW_REPLAYED if few else _REPLAYED)
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def run(self) -> Outcome:
        """All steps."""
        verdicts, report, left_out = usable_verdicts(self.request, self.versions, self.original)
        trained, unknown = self._trained_prompts()
        sides = split(verdicts, trained)
        judged = judged_prompts(sides.training)
        if not judged:
            raise UserError(
                f"{self.request.feedback}: the verdicts contradict each other, so there is nothing to learn"
            )
        counts = {
            "verdicts": len(verdicts),
            "trained_on": len(sides.training),
            "held_back": len(sides.held_back),
            "kinds": dict(Counter(verdict.kind for verdict in verdicts)),
            "replaced": report.replaced,
            "withdrawn": report.withdrawn,
            "bad_lines": report.bad_lines,
            "left_out": dict(left_out),
        }
        self.say(describe(counts))
        replay = self._replay({verdict.opening_id for verdict in verdicts})
        self._lap("read")
        yardstick = self._yardstick(replay, verdicts, sides.held_back)
        original = measure(self.original, yardstick)
        current = original if self.current is None else measure(self.current, yardstick)
        self.current = None  # frees its memory
        self._lap("measure")
        lesson = self._lesson(judged, replay, yardstick)
        self.say(
            f"training: {self.training.method}, {_PARTS[self.training.part or 'full']}, on {len(lesson.judged)} judged "
            f"and {len(lesson.replay)} replayed prompts ({replay.source})"
        )
        with tempfile.TemporaryDirectory(prefix="rlchat-learn-") as scratch:
            version = train(
                self.request.model, self.original, lesson, self.training, Path(scratch), self.request.base_model
            )
            version.policy.model.to(self.original.model.backbone.device).eval()
            self._lap("train")
            new, decision = self._judge(version, yardstick, original, current, sides.why_none)
            self._lap("measure")
        decision.notes.extend(unknown if sides.held_back else [])
        figures = self._figures({**counts, "replayed": len(lesson.replay)}, replay, (original, current, new), decision)
        number, path = None, None
        if decision.accepted:
            recorded = {**finite(figures), "trained_prompts": sides.trained_prompts}
            number, path = self.versions.accept(
                lambda file: self._write(file, version, counts), recorded, above=_highest(verdicts)
            )
        else:
            self.versions.reject(finite(figures))
        return Outcome(decision, number, path, figures, original, current, new, version.policy)

    def _judge(
        self, trained: Trained, yardstick: Yardstick, original: Figures, current: Figures, why_none: str
    ) -> tuple[Figures, Decision]:
        """The figures of the version, and the decision. A version that computes NaN has no figures."""
        try:
            new = measure(trained.policy, yardstick)
        except NonFiniteError:
            return Figures.none(), Decision([*trained.alarms, "the version computes NaN or infinity"])
        return new, judge(original, current, new, self.request.bounds, why_none, trained.alarms)

    def _trained_prompts(self) -> tuple[list[str], list[str]]:
        """The ids of the prompts that trained the version in use, and a note if they are not known."""
        in_use = self.request.current or self.request.model
        bundle = self.current or self.original
        found = trained_prompts(in_use)
        if found is None and isinstance(bundle.about.get("learned"), dict):
            record = in_use.with_suffix(".json")
            return [], [f"{record}, which says what trained {in_use}, was not found: its agreement may be too high"]
        return found or [], []

    def _replay(self, openings: set[str]) -> Replay:
        data = data_of(self.original.about)
        limits = {"limit": self.replay_prompts, "held_out_limit": self.request.control_prompts}
        if self.request.replay:
            return read_replay(replace(data, paths=[*map(str, self.request.replay)]), openings, **limits)
        paths = data.paths
        if paths and all(Path(path).is_file() for path in paths):
            return read_replay(data, openings, **limits)
        missing = f"{', '.join(paths)}, which the model file names, was not found" if paths else "no --replay"
        self.say(f"{missing}: replaying packaged everyday prompts, without human replies")
        return everyday_replay(self.replay_prompts, openings)

    def _yardstick(
        self, replay: Replay, verdicts: Sequence[JudgedResponse], held_back: Sequence[JudgedResponse]
    ) -> Yardstick:
        seed = self.training.seed
        controls = replay.controls if replay.checked else []
        greedy = respond(self.original, controls, Sampling(self.training.tokens, 0.0), seed) if controls else []
        controls = uncorrected(controls, [reply.text for reply in greedy], verdicts)
        texts = respond(self.original, replay.controls, self._sampling, seed) if replay.controls else []
        originals = [(p, reply) for p, reply in zip(replay.controls, texts, strict=True) if reply.text.strip()]
        judged = judged_prompts(held_back)
        return Yardstick(
            questions=questions_of(held_back, judged, self.original, self._sampling, seed + 1),
            judged=judged_responses(judged, self.original),
            threads=replay.threads,
            controls=controls,
            originals=originals,
            max_new_tokens=self.training.tokens,
        )

    def _lesson(self, judged: list[Conversation], replay: Replay, yardstick: Yardstick) -> Lesson:
        """The training data. PPO generates its own responses; DPO holds the log-probs of the original model's."""
        ended = [reply.ended for _, reply in yardstick.originals]
        truncated = 1 - sum(ended) / len(ended) if ended else 0.0
        prompts, bad = replay.prompts, rejected_texts(judged)
        if self.training.method == "ppo":
            return Lesson(judged, [replace(p, references=()) for p in prompts], replay.judged, truncated)
        replies = respond(self.original, prompts, self._sampling, self.training.seed + 2) if prompts else []
        texts = [reply.text.strip() for reply in replies]
        kept = [held(p, text) for p, text in zip(prompts, texts, strict=True) if text and words_of(text) not in bad]
        return Lesson(judged, kept, replay.judged, truncated)

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.training.tokens, 1.0)

    def _figures(
        self, counts: dict[str, Any], replay: Replay, measured: tuple[Figures, Figures, Figures], decision: Decision
    ) -> dict[str, Any]:
        original, current, new = measured
        return {
            "accepted": decision.accepted,
            "reasons": decision.reasons,
            "notes": decision.notes,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": self.request.model.name,
            "model_id": identity(self.original),
            "current": None if self.request.current is None else self.request.current.name,
            "feedback": counts,
            "feedback_file": self.request.feedback.name,
            "replay": replay.source,
            "training": asdict(self.training),
            "bounds": asdict(self.request.bounds),
            "original": original.values(),
            "before": current.values(),
            "after": {**new.values(), "kl": kl_between(original, new)},
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }

    def _write(self, path: Path, trained: Trained, counts: dict[str, Any]) -> None:
        """Writes the model file, after the reward model that it names."""
        about = {**self.original.about}
        origin = {"from": self.request.model.name, "model_id": identity(self.original)}
        about["learned"] = {**origin, "method": self.training.method, **counts}
        reward_path = path.with_suffix(".reward.pt")
        if trained.reward is not None:
            about["reward"] = reward_with_model(trained, reward_path)
            trained.reward.about = {"learned": about["learned"]}
            save_bundle(reward_path, trained.reward)
        try:
            save_bundle(
                path, PolicyBundle(trained.policy.model, self.original.tokenizer, self.original.max_length, about)
            )
        except BaseException:
            if trained.reward is not None:
                reward_path.unlink(missing_ok=True)
            raise

    def _lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began
        self._began = now


_PARTS = {"full": "all weights", "lora": "LoRA"}
