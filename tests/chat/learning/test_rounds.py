"""What came of a round, from its figures, its exit code and its log."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlchat.chat.learning.rounds import Outcome, Round, outcomes
from rlchat.chat.learning.state import State
from rlchat.chat.versions import Versions
from rlchat.utils.files import write_atomically


def failure(tmp_path: Path, code: str) -> str:
    round_ = Round((sys.executable, "-c"), [code], tmp_path / "learn.log", tmp_path / "scratch")
    round_._process.wait(60)
    round_.close()
    assert round_.code != 0
    return round_.failure().replace(str(tmp_path), "…")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('rlchat: a.jsonl:3: no verdict; fix it'); raise SystemExit(2)", "a.jsonl:3: no verdict; fix it"),
        ("raise SystemExit(2)", "learning failed with exit code 2; see …/learn.log"),
        ("1 / 0", "learning failed with exit code 1; see …/learn.log"),
        ("raise MemoryError", "learning needs more memory than it may use; raise --learn-memory, or see …/learn.log"),
        (
            "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried …')",
            "learning needs more memory than it may use; raise --learn-memory, or see …/learn.log",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "learning was ended by signal 9, as the system does when memory runs out",
        ),
        ("import os; os.kill(os.getpid(), 11)", "learning was ended by signal 11; see …/learn.log"),
    ],
)
def test_a_failure_is_one_sentence(tmp_path: Path, code: str, expected: str) -> None:
    assert failure(tmp_path, code) == expected


def test_temporary_files_are_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "left").touch()
    code = "import tempfile; tempfile.mkdtemp(prefix='mine-'); print(tempfile.gettempdir()); raise SystemExit(2)"
    assert failure(tmp_path, code) == "…/scratch"
    assert [path.name[:5] for path in (tmp_path / "scratch").iterdir()] == ["mine-"]


def figures(**more: object) -> dict[str, object]:
    return {"accepted": True, "date": "2026-11-01", "feedback": {"verdicts": 9}, "reasons": [], **more}


def test_outcomes_are_read_from_the_figures(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "chat.pt")
    measured = {"agrees": 9, "verdicts": 12, "correct": 100, "controls": 128}
    versions.accept(
        lambda path: write_atomically(path, lambda file: file.write(b"")),
        figures(
            before={**measured, "agrees": 5}, after=measured, seconds={"train": 2.0, "read": 0.5}, date="2026-11-02"
        ),
    )
    versions.reject(figures(accepted=False, reasons=["a", "b"]))
    versions.reject({"accepted": False})  # from another program
    (versions.folder / "7.json").write_text("{")
    (versions.folder / "8.json").write_text('["accepted"]')
    rejected, accepted = outcomes(versions)
    assert rejected.sentence == "rejected: a; b"
    assert (accepted.number, accepted.seconds, accepted.verdicts) == (1, 2.5, 9)
    assert accepted.sentence == (
        "version 1 has learned from 9 verdicts: agrees with 9 of 12 held-back verdicts, before: 5; "
        "100 of 128 controls are correct, before: 100"
    )


def test_what_a_version_has_learned_from_and_what_was_left_out(tmp_path: Path) -> None:
    """Without agreement, the sentence says what was taught, and that a fall of the controls is allowed."""
    versions = Versions(tmp_path / "chat.pt")
    feedback = {
        "verdicts": 8,
        "kinds": {"corrected": 5, "good": 3},
        "left_out": {"on responses of other models": 2, "longer than max_length 64": 1},
    }
    note = "agreement is not part of the gate: 8 verdicts are fewer than 10"
    none = {"agrees": None, "verdicts": 0, "controls": 255}
    versions.accept(
        lambda path: write_atomically(path, lambda file: file.write(b"")),
        figures(feedback=feedback, notes=[note], before={**none, "correct": 233}, after={**none, "correct": 232}),
    )
    (outcome,) = outcomes(versions)
    assert outcome.sentence == (
        "version 1 has learned from 8 verdicts (3 good, 5 corrected): "
        "232 of 255 controls are correct, before: 233, which is within the bound"
    )
    assert outcome.remarks == ("left out: 2 on responses of other models, 1 longer than max_length 64", note)


def test_the_sentence_without_measures() -> None:
    assert Outcome(3, (), (), "", 1).sentence == "version 3 has learned from 1 verdict"


@pytest.mark.skipif(sys.platform == "win32" or sys.version_info < (3, 11), reason="needs process_group of Popen")
def test_ctrl_c_does_not_reach_it_and_it_stays_in_the_session(tmp_path: Path) -> None:
    code = "import os; print(os.getpgid(0) == os.getpid(), os.getsid(0), flush=True); raise SystemExit(2)"
    assert failure(tmp_path, code) == f"True {os.getsid(0)}"


def test_outcomes_keep_their_order_if_the_clock_is_set_back(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "chat.pt")
    for verdicts, date, accepted in ((1, "09", True), (2, "04", True), (3, "03", False), (4, "01", False)):
        row = figures(feedback={"verdicts": verdicts}, date=f"2026-11-{date}", accepted=accepted)
        if accepted:
            versions.accept(lambda path: write_atomically(path, lambda file: file.write(b"")), row)
        else:
            versions.reject(row)
    order = [outcome.verdicts for outcome in outcomes(versions)]
    assert [one for one in order if one < 3] == [1, 2]
    assert [one for one in order if one > 2] == [3, 4]


def test_no_number_is_given_twice(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "chat.pt")
    assert versions.next_number() == 1
    State(highest=4).write(versions.folder / "state.json")
    assert versions.next_number() == 5
    for above, number in ((0, 5), (7, 8), (2, 9)):
        assert versions.accept(lambda path: path.write_bytes(b""), figures(), above)[0] == number
    (versions.folder / "state.json").write_text("{")
    assert versions.next_number() == 10
