"""The runner of the planted faults, on two faults and a healthy run, and the registry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.planted_faults import __main__ as runner
from benchmarks.planted_faults.faults import FAULTS


def test_two_faults_are_noticed_and_a_healthy_run_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "write_start", lambda path, write=runner.write_start: write(path, steps=2))
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    maximum = torch.maximum
    words = ["--faults", "reward scaled by length", "clip on the wrong side", "--healthy", "1", "--iterations", "2"]
    runner.main([*words, "--json", str(numbers), "--out", str(page)])
    assert torch.maximum is maximum  # the code is as before
    results = json.loads(numbers.read_text())
    assert [(r["alarms"], r["iterations"]) for r in results["faults"]] == [(["rewards"], 1), (["gradient"], 1)]
    assert [(r["name"], r["alarms"], r["iterations"]) for r in results["healthy"]] == [("as the faults", [], 2)]
    text = page.read_text()
    assert text.startswith("before\n<!-- results -->\n2 of 2 faults are noticed. 0 of 1 healthy runs raise an alarm.\n")
    assert "| [understand-r1-zero #10](https://github.com/sail-sg/understand-r1-zero/issues/10) | rewards | 1 |" in text
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in text
    assert "2 of 2 faults are noticed" in capsys.readouterr().out


def test_a_table_with_misses_and_false_alarms() -> None:
    name = "gradients clipped to 0"
    faulty = [runner.Result(name, 0, [], 20), runner.Result(name, 1, ["frozen"], 3), runner.Result(name, 2, ["kl"], 5)]
    text = runner.table(
        faulty, [runner.Result("rloo", 7, ["kl"], 4), runner.Result("rloo", 8, [], 20)], 12.3, "command"
    )
    assert text.startswith("0 of 1 faults are noticed. 1 of 2 healthy runs raise an alarm: kl (rloo, seed 7).\n")
    assert "| frozen, kl | 3 to 5 |" in text
    assert text.endswith("`command`, 12 s of CPU time.")
    assert "| nothing | – |" in runner.table(faulty[:1], [], 1.0, "command")


def test_every_fault_has_a_sentence_and_a_report() -> None:
    assert len(FAULTS) >= 20
    for fault in FAULTS.values():
        assert re.fullmatch(r"[A-Z][^.]*\.", fault.what), fault.name
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", fault.source), fault.name
