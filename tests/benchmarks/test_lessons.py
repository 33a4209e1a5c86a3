"""The lessons of ``docs/lessons/``: their form, their short form, and the runner that compares their figures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from helpers.command_line import empty_plots, working_in

from benchmarks.lessons.__main__ import code_digest, run_apart
from benchmarks.lessons.bands import band, write_bands
from benchmarks.lessons.lesson import Figure, Lesson, lessons, read_lesson
from benchmarks.lessons.running import commands, run_lesson

LESSONS = lessons()
QUICK = ("1", "3", "4", "5", "6", "8")  # at most 3 s of CPU time each; the others are for `make test_slow`
SHORT = [
    pytest.param(lesson, id=lesson.name, marks=[] if lesson.name.startswith(QUICK) else pytest.mark.slow)
    for lesson in LESSONS
]

SMALL = """# 1. Counting

<!-- short form: STEPS = 2; fit --trainer.max_epochs=1 -->

```python
SEED = 0
STEPS = 10
```

```text
not run
```

```bash
echo "$((3 + 4))" > seven.txt
```

```python
total = int(open("seven.txt").read()) + STEPS + SEED
```

| figure | in the code | expected | band |
|---|---|---|---|
| the total | `total` | 17 | 16.5 to 17.5 |
| its square | `total**2` | ? | ? |
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "1-counting.md"
    path.write_text(SMALL)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_a_lesson_is_read(small: Path) -> None:
    lesson = read_lesson(small)
    assert (lesson.name, lesson.title) == ("1-counting", "1. Counting")
    assert [(block.language, block.line) for block in lesson.blocks] == [("python", 6), ("bash", 15), ("python", 19)]
    assert lesson.parameters == {"SEED": 0, "STEPS": 10}
    assert (lesson.short, lesson.short_options) == ({"STEPS": 2}, "--trainer.max_epochs=1")
    assert lesson.figures[0] == Figure("the total", "total", 17.0, 16.5, 17.5)
    assert math.isnan(lesson.figures[1].expected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("SEED = 0\n", "", "does not set SEED"),
        ("STEPS = 2;", "EPOCHS = 2;", "does not set EPOCHS"),
        ("STEPS = 10", "print(10)", "must only set constants"),
        ("```python\nSEED = 0", "```bash\nSEED = 0", "a block of Python that sets SEED"),
        ("16.5 to 17.5", "about 17", "low to high"),
        ("| `total` |", "| total |", "low to high"),
    ],
)
def test_a_lesson_of_another_form_is_refused(old: str, new: str, message: str, small: Path) -> None:
    small.write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=rf"1-counting\.md.*{message}"):
        read_lesson(small)


@pytest.mark.parametrize(("seed", "short", "total"), [(0, False, 17), (5, False, 22), (5, True, 14)])
def test_blocks_run_in_order_with_the_seed(seed: int, short: bool, total: int, small: Path, folder: Path) -> None:
    assert run_lesson(read_lesson(small), folder, seed, short) == {"the total": total, "its square": total**2}
    assert (folder / "seven.txt").read_text() == "7\n"


def test_a_failing_command_names_its_place(small: Path, folder: Path) -> None:
    small.write_text(SMALL.replace('echo "$((3 + 4))" > seven.txt', "ls nowhere"))
    with pytest.raises(RuntimeError, match=r"1-counting\.md:15: exit code 2 of ls nowhere"):
        run_lesson(read_lesson(small), folder)


def test_a_traceback_names_the_line_of_the_lesson(small: Path, folder: Path) -> None:
    small.write_text(SMALL.replace("total = int", "\nx = 1 / SEED\ntotal = int"))
    with pytest.raises(ZeroDivisionError) as caught:
        run_lesson(read_lesson(small), folder)
    place = caught.traceback[-1]
    assert (place.path.name, place.lineno + 1) == ("1-counting.md", 20)


def test_seeds_and_options_of_commands() -> None:
    code = "rlchat fit --seed_everything 0 \\\n  --data.seed=0 --x 0  # twice\nrlchat test --model.seed 0\n"
    assert commands(code, 7, "--short 1") == [
        "rlchat fit --seed_everything 7 --data.seed=7 --x 0 --short 1",
        "rlchat test --model.seed 7",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10.0, 12.0, 11.0], (8.0, 14.0)),  # the range 2 on both sides
        ([100.0, 100.0], (95.0, 105.0)),  # no range: 5 %
        ([0.1, 0.4], (0.0, 0.7)),  # not below 0
        ([0.8, 1.0], (0.6, 1.0)),  # not above 1
        ([-1.0, 1.0], (-3.0, 1.0)),
        ([0.0, 0.0], (0.0, 0.05)),
    ],
)
def test_band(values: list[float], expected: tuple[float, float]) -> None:
    assert band(values) == pytest.approx(expected)


def test_bands_that_are_missing_are_written(small: Path) -> None:
    lesson = read_lesson(small)
    write_bands(lesson, [{"the total": 1.0, "its square": 289.0}, {"the total": 1.0, "its square": 300.0}])
    rows = [line for line in small.read_text().splitlines() if line.startswith("| the") or line.startswith("| its")]
    assert rows == ["| the total | `total` | 17 | 16.5 to 17.5 |", "| its square | `total**2` | 289 | 274 to 315 |"]


def test_a_kept_run_is_not_repeated_unless_its_code_changed(small: Path, tmp_path: Path) -> None:
    lesson, folder = read_lesson(small), tmp_path / "keep" / "1-counting-3"
    folder.mkdir(parents=True)
    kept = {"code": code_digest(lesson, False), "figures": {"the total": 20.0}, "cpu_s": 4.0}
    (folder / "kept.json").write_text(json.dumps(kept))
    assert run_apart(lesson, 3, False, tmp_path / "keep") == ({"the total": 20.0}, 4.0)
    small.write_text(SMALL.replace("16.5 to 17.5", "1 to 20").replace("# 1. Counting", "# 1. Other words"))
    assert run_apart(read_lesson(small), 3, False, tmp_path / "keep") == ({"the total": 20.0}, 4.0)
    small.write_text(SMALL.replace("+ SEED", "- SEED"))
    for other, short in ((read_lesson(small), False), (lesson, True)):
        with pytest.raises(SystemExit, match=r"1-counting-3 is not a finished run of this lesson"):
            run_apart(other, 3, short, tmp_path / "keep")


def test_nan_is_outside_every_band() -> None:
    assert not Figure("x", "x", 0.0, -math.inf, math.inf).contains(math.nan)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_figures_are_measured_and_in_their_bands(lesson: Lesson) -> None:
    assert len(lesson.figures) >= 5
    assert [figure for figure in lesson.figures if not figure.contains(figure.expected)] == []


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_every_lesson_has_its_parts(lesson: Lesson) -> None:
    text = lesson.path.read_text(encoding="utf-8")
    parts = ["**Question.**", "## What to look at", "## Figures", "## Exercise", "<details><summary>Answer</summary>"]
    assert [part for part in [*parts, "## Read on", "rlhfbook.com/c/", ".png)"] if part not in text] == []
    prose = re.sub(r"^```.*?^```|^[|#!<].*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    sentences = re.split(r"(?<=[.:;?!])\s+|\n\n|\n- ", prose)
    assert [sentence for sentence in sentences if len(sentence.split()) > 22] == []


@pytest.mark.parametrize("lesson", SHORT)
def test_short_form_runs(lesson: Lesson, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    with working_in(folder), empty_plots():
        figures = run_lesson(lesson, folder, seed=1, short=True)
    assert all(map(math.isfinite, figures.values())), figures
