"""Training of a version: DPO, or an update of the reward model and PPO, with the stages of `rlchat fit`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from rich import get_console

from rlchat.callbacks.alarms import Alarms
from rlchat.callbacks.progress_bar import OneLineProgressBar
from rlchat.chat.learning.settings import Training
from rlchat.conversation import Conversation
from rlchat.data.datamodule import OASST2DataModule
from rlchat.errors import NonFiniteError, UserError
from rlchat.learn.examples import write_prompts
from rlchat.models.model_file import PolicyBundle, RewardBundle, save_bundle
from rlchat.ppo.module import PPOModule
from rlchat.rewards import Factor, LearnedQuality, Reward
from rlchat.rewards.described import check_arguments, find_factor
from rlchat.training.base import StageModule
from rlchat.training.dpo import DPOModule
from rlchat.training.reward_model import RewardModelModule

_FEWEST_STEPS, _FEWEST_PASSES, _MOST_PASSES = 100, 4, 12
_LORA_STEPS, _LORA_PASSES = 24, 2  # of DPO with LoRA, see `Training.rows_per_batch`
# The gradient of a pair or a label is β times that of the SFT loss on corrections, which would otherwise outweigh them.
_LABEL_COEF, _SFT_COEF = 2.0, 0.2
# The label of a 👎. Its loss is smallest at β · log ratio = log(0.45 / 0.55) = -0.2: at β = 0.1, where the response is
# e² times less likely. With the label 0 there is no such place, and it pushes until responses of the same kind break.
_BAD_LABEL = 0.45
_GROUP, _PROMPTS_PER_ITERATION = 4, 16
_MORE_TRUNCATED = 0.2  # of all responses of a version, than of the original model's

_log = logging.getLogger("rlchat")
# Warnings that say nothing here: nothing is selected by validation, and alarms are shown with the outcome.
_EXPECTED = ("validation is off", "no validation was run", "alarm: ")


@dataclass(frozen=True)
class Lesson:
    """What is trained on.

    Attributes:
        judged: the prompts of the verdicts, with ranks and labels of their responses.
        replay: prompts of the original training. For DPO, each has a response of the original model, whose log-prob is
            held where it is; see :func:`rlchat.learn.examples.held`.
        judged_replay: prompts of the original training with ranks and labels, for the reward model.
        truncated: the share of the original model's responses that are truncated at ``max_new_tokens``.
    """

    judged: list[Conversation]
    replay: list[Conversation]
    judged_replay: list[Conversation]
    truncated: float


@dataclass(frozen=True)
class Trained:
    """A trained version, not yet written.

    ``reward`` is the updated reward model of ppo; ``reward_file`` is where it was during training.
    """

    policy: PolicyBundle
    reward: RewardBundle | None
    alarms: list[str]
    reward_file: Path | None = None


def train(
    model: Path, original: PolicyBundle, lesson: Lesson, options: Training, scratch: Path, base_model: str | None
) -> Trained:
    """Trains a version of the model file ``model`` on ``lesson``.

    The policy starts from ``model``, which is therefore the reference model of DPO and PPO.

    Args:
        model: the original model file.
        original: the model in it.
        lesson: what is trained on.
        options: how, after :meth:`Training.for_model`.
        scratch: a folder for intermediate files.
        base_model: where the base of an adapter file is.

    Raises:
        UserError: the options do not fit the model, or an extra is not installed.
    """
    L.seed_everything(options.seed, verbose=False)
    common: dict[str, Any] = {
        "init_from": str(model),
        "base_model": base_model,
        "learning_rate": options.learning_rate,
        "adapter": "lora" if options.part == "lora" else None,
        "lora_rank": options.lora_rank,
        "lora_alpha": 2.0 * options.lora_rank,
        "train_layers": options.train_layers,
    }
    device = original.model.backbone.device.type
    place = _Place(scratch, "gpu" if device == "cuda" else device)
    if options.method == "dpo":
        return _train_dpo(lesson, options, place, common)
    return _train_ppo(model, original, lesson, options, place, common)


@dataclass(frozen=True)
class _Place:
    """Where a stage runs: a folder for its files, and Lightning's name of the accelerator."""

    scratch: Path
    accelerator: str


def _train_dpo(lesson: Lesson, options: Training, place: _Place, common: dict[str, Any]) -> Trained:
    rows = [*map(_softened, lesson.judged), *lesson.replay]
    module = DPOModule(
        **common,
        beta=options.beta,
        label_coef=_LABEL_COEF,
        sft_coef=_SFT_COEF,
        schedule="cosine",
        warmup=0.1,
        keep_ref_logprobs=options.part == "lora",  # a large model, whose passes take most of the time
    )
    alarms = _fit(module, _data(rows, place.scratch / "dpo", options), _passes(len(rows), options), place, [], clip=1.0)
    return Trained(module.bundle(), None, alarms)


def _softened(prompt: Conversation) -> Conversation:
    """``prompt`` with :data:`_BAD_LABEL` in place of the label 0."""
    references = (replace(r, quality=_BAD_LABEL) if r.quality == 0 else r for r in prompt.references)
    return replace(prompt, references=tuple(references))


def _train_ppo(
    model: Path, original: PolicyBundle, lesson: Lesson, options: Training, place: _Place, common: dict[str, Any]
) -> Trained:
    described = _described_reward(original, model)
    index = _updated_row(described)
    known = None if index is None else Path(_arguments(described[index])["bundle"])
    ranked = [*lesson.judged, *lesson.judged_replay]
    start = {**common, "init_from": str(known), "base_model": None} if known and known.is_file() else common
    reward_module = RewardModelModule(**start, label_coef=1.0, warmup=0.1)
    data = _data(ranked, place.scratch / "reward", options)
    alarms = _fit(reward_module, data, _passes(len(ranked), options), place, [], clip=1.0)
    reward_file = place.scratch / "reward_model.pt"
    save_bundle(reward_file, reward_module.bundle())
    # Only good responses of the verdicts are imitated: the KL penalty holds the policy to the original on replay.
    prompts = [*lesson.judged, *lesson.replay]
    imitates = any(r.rank == 0 or r.quality == 1 for prompt in lesson.judged for r in prompt.references)
    module = PPOModule(
        **common,
        reward=_reward(described, reward_file),
        max_new_tokens=options.tokens,
        group_size=_GROUP,
        advantage="rloo",
        ppo_epochs=2,
        minibatches=4,
        adam_beta2=0.95,
        kl_coef=options.beta,
        sft_coef=_SFT_COEF if imitates else 0.0,
        seed=options.seed,
    )
    data = _data(prompts, place.scratch / "ppo", options, _PROMPTS_PER_ITERATION)
    per_pass = max(1, len(prompts) // _PROMPTS_PER_ITERATION)
    watch, passes = _alarms(options.iterations, lesson.truncated), -(-options.iterations // per_pass)
    limit = -(-options.iterations // passes)
    alarms += _fit(module, data, passes, place, [watch], limit_train_batches=limit)
    # A factor that is the same for all responses, such as one for a missing end, is no danger.
    raised = [note["message"] for note in watch.notes if not note["what"].startswith("reward/")]
    alarms += [f"alarm in training: {message}" for message in raised]
    return Trained(module.bundle(), reward_module.bundle(), alarms, reward_file)


def _alarms(iterations: int, truncated: float) -> Alarms:
    """The alarms of a short run.

    A problem must last for a quarter of the iterations. ``truncated`` is the share of the original model's responses
    that are truncated: a version is no worse for it.
    """
    usual = Alarms()
    patience = max(1, min(usual.patience, iterations // 4))
    return Alarms(patience=patience, max_truncated=min(1.0, max(usual.max_truncated, truncated + _MORE_TRUNCATED)))


def _passes(rows: int, options: Training) -> int:
    """Passes over ``rows`` that make about :data:`_FEWEST_STEPS` optimizer steps, or :data:`_LORA_STEPS`."""
    lora = options.part == "lora" and options.method == "dpo"
    wanted, fewest = (_LORA_STEPS, _LORA_PASSES) if lora else (_FEWEST_STEPS, _FEWEST_PASSES)
    steps = -(-rows // options.rows_per_batch)
    return options.passes or min(max(-(-wanted // steps), fewest), _MOST_PASSES)


def _data(prompts: Sequence[Conversation], folder: Path, options: Training, batch_size: int = 0) -> OASST2DataModule:
    """A data module over ``prompts``, all of which train."""
    folder.mkdir()
    write_prompts(folder / "rows.jsonl", prompts)
    return OASST2DataModule(
        path=str(folder / "rows.jsonl"),
        batch_size=batch_size or options.rows_per_batch,
        lang=None,
        loss_on="last",
        val_fraction=0.0,
        test_fraction=0.0,
        seed=options.seed,
        cache_dir=str(folder / "cache"),
    )


def _fit(
    module: StageModule,
    data: OASST2DataModule,
    passes: int,
    place: _Place,
    callbacks: list[L.Callback],
    *,
    clip: float | None = None,
    limit_train_batches: int | None = None,
) -> list[str]:
    """Trains ``module``; returns what went wrong, as sentences."""
    bar: list[L.Callback] = [OneLineProgressBar()] if get_console().is_terminal else []
    trainer = L.Trainer(
        max_epochs=passes,
        devices=1,
        accelerator=place.accelerator,
        gradient_clip_val=clip,
        limit_train_batches=limit_train_batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bool(bar),
        default_root_dir=str(place.scratch),
        callbacks=[*callbacks, *bar],
    )
    with _without_expected_warnings():
        try:
            trainer.fit(module, datamodule=data)
        except NonFiniteError:
            return [f"alarm in training: it diverged, {module.guard.last_culprit} was not finite"]
    if module.guard.skipped_steps:
        return [f"alarm in training: {module.guard.last_culprit} was not finite, so steps were skipped"]
    return []


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_EXPECTED)

    _log.addFilter(keep)
    try:
        yield
    finally:
        _log.removeFilter(keep)


def _described_reward(original: PolicyBundle, model: Path) -> list[dict[str, Any]]:
    """The reward that a model file names, as rows with a ``class_path`` and ``init_args``; others are left out.

    A reward model is searched at its path in training, then beside the model file.
    """
    described = original.about.get("reward")
    rows = described if isinstance(described, list) else []
    found = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("class_path"), str):
            continue
        if _is_learned(row):
            there = Path(str(_arguments(row).get("bundle")))
            place = next((path for path in (there, model.parent / there.name) if path.is_file()), there)
            row = {**row, "init_args": {**_arguments(row), "bundle": str(place)}}
        found.append(row)
    return found


def _arguments(row: dict[str, Any]) -> dict[str, Any]:
    arguments = row.get("init_args")
    return arguments if isinstance(arguments, dict) else {}


def _is_learned(row: dict[str, Any]) -> bool:
    return row["class_path"].rpartition(".")[2] == LearnedQuality.__name__


def _updated_row(described: Sequence[dict[str, Any]]) -> int | None:
    """The index of the reward model that is updated: the first that exists, or else the first; None without one."""
    learned = [i for i, row in enumerate(described) if _is_learned(row)]
    return next((i for i in learned if Path(_arguments(described[i])["bundle"]).is_file()), min(learned, default=None))


def _reward(described: Sequence[dict[str, Any]], reward_file: Path) -> Reward:
    """The reward ``described`` with the updated reward model in its place, or before all factors if it is new."""
    rows = [*described]
    index = _updated_row(rows)
    if index is None:
        rows.insert(0, {"class_path": "rlchat.rewards.LearnedQuality"})
    updated = rows[index or 0]
    # The updated reward model is a file with all weights, which needs no base.
    kept = {name: value for name, value in _arguments(updated).items() if name != "base_model"}
    rows[index or 0] = {**updated, "init_args": {**kept, "bundle": str(reward_file)}}
    factors: list[Factor] = []
    for row in rows:
        try:
            factor = find_factor(row["class_path"])
            check_arguments(factor, _arguments(row))
            factors.append(factor(**_arguments(row)))
        except (UserError, TypeError) as error:
            _log.warning("the reward leaves out %s: %s", row["class_path"], error)
    return Reward(factors)
