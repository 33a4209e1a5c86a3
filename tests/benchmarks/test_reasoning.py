"""`benchmarks/reasoning.py`: which commands run, and the table. tests/tasks/test_recipe.py runs the commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reasoning


def metrics(accuracy: float) -> dict[str, float]:
    return dict.fromkeys(reasoning.FIGURES.values(), accuracy)


class Commands:
    """In place of processes: each test command writes the metrics of one more version; ``fail`` stops before it."""

    def __init__(self, fail: str = "") -> None:
        self.fail = fail
        self.names: list[str] = []

    def __call__(self, command: list[str], cwd: Path, **options: Any) -> None:
        name = command[3]
        self.names.append(name)
        if name == self.fail:
            raise subprocess.CalledProcessError(1, command)
        if name == "test":
            logs = cwd / "lightning_logs" / "ppo_test"
            version = len(list(logs.glob("*"))) + 9 if logs.exists() else 9  # version_9, then version_10
            (logs / f"version_{version}").mkdir(parents=True)
            values = metrics(0.25 if version == 9 else 0.95)
            lines = [",".join(["step", *values]), ",".join(["0", *map(str, values.values())])]
            (logs / f"version_{version}" / "metrics.csv").write_text("\n".join(lines))


def test_a_run_gives_its_row_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "reasoning-3"
    monkeypatch.setattr("subprocess.run", broken := Commands(fail="fit"))
    with pytest.raises(subprocess.CalledProcessError):
        reasoning.run(3, folder)
    assert broken.names == ["data", "tokenizer", "fit"]
    monkeypatch.setattr("subprocess.run", commands := Commands())
    reasoning.run(3, folder)
    assert commands.names == ["fit", "test", "fit", "test"]  # the data is there
    (folder / "seconds.json").write_text(json.dumps({"ppo": 90.0, "sft": 30.0}))
    row = reasoning.table([folder]).splitlines()[-1]
    assert row == "| reasoning-3 | " + "25.0% → 95.0% | " * 5 + "2.0 |"


def test_the_seed_reaches_weights_sampling_and_splits() -> None:
    commands = reasoning.steps(7)
    for name in ("start", "ppo", "end"):
        words = commands[name]
        assert [words[words.index(f"--{option}") + 1] for option in ("seed_everything", "data.seed", "model.seed")] == [
            "7",
            "7",
            "7",
        ]
    assert commands["sft"][-4:] == ["--seed_everything", "7", "--data.seed", "7"]
