"""Rows of prompts and answers from the tasks of the package reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760).

A row holds one answer. Many tasks accept several, and reasoning-gym scores them with code of the task, which a row
cannot hold. The tasks listed here give the full score to one answer only. They were read in version 0.1.25.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.fields import row_check
from rlchat.errors import UserError, one_line
from rlchat.utils.imports import install_command
from rlchat.utils.progress import DelayedProgress

CHECKS = ("exact", "number")

# Their own score is 1 for the answer of the row, perhaps in another case or with other white space, and below 1 for
# everything else. So is the score of all tasks that use the scoring of the base class.
_EXACT = frozenset(
    [
        "ab",
        "arc_agi",
        "binary_matrix",
        "calendar_arithmetic",
        "circuit_logic",
        "color_cube_rotation",
        "dice",
        "emoji_mystery",
        "family_relationships",
        "figlet_font",
        "futoshiki",
        "letter_jumble",
        "manipulate_matrix",
        "mini_sudoku",
        "needle_haystack",
        "path_star",
        "rearc",
        "self_reference",
        "sentence_reordering",
        "spell_backward",
        "spiral_matrix",
        "string_insertion",
        "sudoku",
        "survo",
        "tsumego",
        "word_sorting",
        "zebra_puzzles",
    ]
)
# Their own score is 1 for every way to write the number.
_NUMBER = frozenset(["chain_sum", "decimal_chain_sum", "gsm_symbolic", "products", "rectangle_count"])

_RESERVED = {"seed": "--seed", "size": "-n"}


@dataclass(frozen=True)
class Settings:
    """What to generate.

    Attributes:
        task: the name of a task of reasoning-gym.
        rows: the number of different questions.
        seed: of the task; question i is drawn from ``seed + i``.
        options: values of the task's own configuration.
        check: how an answer matches a response; None: what fits the task.
        one_answer: accept a task with several right answers.
    """

    task: str
    rows: int
    seed: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    check: str | None = None
    one_answer: bool = False


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a dictionary; values are YAML. Raises :class:`UserError` for a word without ``=``."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UserError(f"invalid value {word!r} for --set: expected KEY=VALUE")
        if key in _RESERVED:
            raise UserError(f"--set {key}: use {_RESERVED[key]} instead")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"invalid value {value!r} for --set {key}: not YAML; quote the value") from error
    return found


def generate_rows(settings: Settings, progress: bool = False) -> tuple[list[dict[str, str]], int]:
    """Rows with ``prompt``, ``answer`` and ``check``, and the number of questions that were drawn for them.

    Every question is there once; those that differ in case or white space only are the same. There are fewer rows than
    wanted if the task repeats itself: after 16 draws for each row, and 1,000 more.

    Raises:
        UserError: reasoning-gym is not installed, the task or an option is unknown or invalid, the task has several
            right answers, or the check does not fit an answer.
    """
    check = _check_of(settings.task, settings.one_answer)
    check = settings.check or check
    rows: dict[str, dict[str, str]] = {}
    drawn = 0
    with DelayedProgress(settings.task, settings.rows, progress) as bar:
        for size in (settings.rows, 4 * settings.rows, 16 * settings.rows + 1000):  # some tasks draw `size` in advance
            dataset = _dataset(settings, size)
            while drawn < size and len(rows) < settings.rows:
                entry = dataset[drawn]
                drawn += 1
                row = _row(entry, check, settings.task)
                rows.setdefault(" ".join(row["prompt"].casefold().split()), row)
                bar.update(len(rows))
    return list(rows.values()), drawn


def checks_of_tasks() -> dict[str, str | None]:
    """The check of each task of reasoning-gym; None for a task with several right answers."""
    return {name: _known_check(name) for name in sorted(_factory().DATASETS)}


def _factory() -> Any:
    try:
        import reasoning_gym.factory
    except ImportError as error:
        command = install_command("reasoning-gym")
        raise UserError(f"rlchat data reasoning-gym needs {error.name}: install it with {command}") from error
    return reasoning_gym.factory


def _known_check(task: str) -> str | None:
    factory = _factory()
    scored_by = factory.DATASETS[task][0].score_answer
    if task in _NUMBER:
        return "number"
    return "exact" if task in _EXACT or scored_by is factory.ProceduralDataset.score_answer else None


def _check_of(task: str, one_answer: bool) -> str:
    known = _factory().DATASETS
    if task not in known:
        near = difflib.get_close_matches(task, known, 3, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else "`rlchat data reasoning-gym --list` prints all tasks"
        raise UserError(f"reasoning-gym has no task {task!r}; {meant}")
    check = _known_check(task)
    if check is None and not one_answer:
        raise UserError(
            f"{task} has several right answers, or several ways to write one, and a row holds one; use another task "
            f"(`rlchat data reasoning-gym --list`), or --one_answer to count all others as wrong"
        )
    return check or "exact"


def _dataset(settings: Settings, size: int) -> Any:
    factory = _factory()
    fields = {field.name for field in dataclasses.fields(factory.DATASETS[settings.task][1])} - set(_RESERVED)
    for name in settings.options:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            meant = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(fields)) or 'none'}"
            raise UserError(f"--set {name}: no such option of {settings.task}; {meant}")
    try:
        return factory.create_dataset(settings.task, **settings.options, seed=settings.seed, size=size)
    except (AssertionError, TypeError, ValueError, OSError) as error:
        given = f"--set {' '.join(f'{key}={value}' for key, value in settings.options.items())}"
        raise UserError(
            f"{settings.task} of reasoning-gym cannot be created with {given}: {one_line(error)}"
        ) from error


def _row(entry: dict[str, Any], check: str, task: str) -> dict[str, str]:
    answer = entry["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{task} of reasoning-gym has questions without an answer, which cannot be checked")
    row = {"prompt": entry["question"].strip(), "answer": answer.strip(), "check": check}
    try:
        row_check(row)
    except BadLineError as error:
        raise UserError(f"the check {check} does not fit an answer of {task}: {error}; use --check exact") from error
    return row
