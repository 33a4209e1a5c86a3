"""What the page is given: rows, token data, curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.look_runs import TOKENS, add_rows, old_rollout, rollout, write_run
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlchat.look.rollouts import Rollouts
from rlchat.runs.curves import read_curves, stamp

FIRST, SECOND = [[0.25, 0.75], [-0.25, 0.5], [0.25, 1.5]], [-2.0, -0.5]


def parsed(chunk: str) -> tuple[dict[str, Any], list[Any]]:
    """The first line, and the token data of each row; a number that JSON does not have is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    head, *lines = chunk.split("\n")
    return json.loads(head), [json.loads(line, parse_constant=refuse) if line else None for line in lines]


def read(run: Path) -> tuple[dict[str, Any], list[Any]]:
    return parsed(Rollouts(run / "rollouts.jsonl").chunk(0))


def test_rows_and_their_tokens(tmp_path: Path) -> None:
    other = rollout(iteration=3, prompt_id="b", factors={"polite": 0.5, "new": 2}, ended_by="token limit", reward=2.5)
    head, tokens = read(write_run(tmp_path / "run", [rollout(), other, rollout(iteration=4)]))
    value, kl, entropy = FIRST
    extremes = [[-1.0, 2.0], value, kl, None, entropy, SECOND]
    assert head["factors"] == ["quality", "polite", "new"]
    assert head["prompts"] == [["a", [["user", "Say hello."]]], ["b", [["user", "Say hello."]]]]
    assert head["rows"] == [
        [1, 0, "Hello", 3, "end of turn", 1.5, 0.25, 0.25, [1.0, 0.5], extremes],
        [3, 1, "Hello", 3, "token limit", 2.5, 0.25, 0.25, [None, 0.5, 2], extremes],
        [4, 0, "Hello", 3, "end of turn", 1.5, 0.25, 0.25, [1.0, 0.5, None], extremes],
    ]
    assert tokens == [TOKENS] * 3
    assert head["damaged"] == []


def test_rows_without_token_data_are_read(tmp_path: Path) -> None:
    """Those of the first version, and prompts are recognized by their text."""
    rows = [old_rollout(), old_rollout(iteration=2), old_rollout(prompt=[{"role": "user", "content": "Hi"}])]
    head, tokens = read(write_run(tmp_path / "run", rows))
    assert [row[1] for row in head["rows"]] == [0, 0, 1]
    assert [row[9] for row in head["rows"]] == [None] * 3
    assert tokens == [None] * 3


DAMAGED = [
    "",
    "{",
    "[1]",
    "null",
    '{"iteration": 1}',
    json.dumps(rollout(reward="much")),
    json.dumps(rollout(prompt=["Hi"])),
    json.dumps(rollout(per_token={**TOKENS, "kl": [0.5]})),
    json.dumps(rollout(per_token={**TOKENS, "kl": [0.5, "x", 0.5]})),
    json.dumps(rollout(per_token={**TOKENS, "text": [1, 2, 3]})),
    json.dumps(rollout(per_token=[1])),
    json.dumps(rollout(per_token={})),
    json.dumps(rollout())[:-40],
    "[" * 100_000,
]


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_lines_are_skipped_and_counted(line: str, tmp_path: Path) -> None:
    head, tokens = read(write_run(tmp_path / "run", [rollout(), line, rollout(iteration=2, prompt_id="b")]))
    assert head["damaged"] == [2]
    assert [row[:2] for row in head["rows"]] == [[1, 0], [2, 1]]
    assert tokens == [TOKENS] * 2


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [rollout()])
    with (run / "rollouts.jsonl").open("ab") as file:
        file.write(json.dumps(rollout(reply="x\x7f")).encode().replace(b"x", b"\xff") + b"\n")
    assert read(run)[0]["damaged"] == [2]


def test_numbers_that_are_not_finite_are_missing(tmp_path: Path) -> None:
    row = json.dumps(
        rollout(kl=float("nan"), value=float("inf"), per_token={**TOKENS, "kl": [float("nan"), 1.0, None]})
    )
    huge = json.dumps(rollout(reward=1)).replace('"reward": 1', '"reward": 1e999')
    head, tokens = read(write_run(tmp_path / "run", [row, huge]))
    assert head["rows"][0][6:8] == [None, None]
    assert head["rows"][0][9][2] == [1.0, 1.0]
    assert tokens[0]["kl"] == [None, 1.0, None]
    assert head["rows"][1][5] is None


def test_the_token_data_may_stand_anywhere_in_the_line(tmp_path: Path) -> None:
    row = rollout(reply='a "per_token":{} b', factors={"per_token": 1.0})
    first = {"per_token": row.pop("per_token"), **row}
    head, tokens = read(write_run(tmp_path / "run", [first, {**row, "per_token": None}, rollout()]))
    assert head["damaged"] == []
    assert tokens == [TOKENS, None, TOKENS]
    assert head["rows"][0][2] == 'a "per_token":{} b'


def test_a_growing_file_is_read_from_where_it_was_left(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [rollout()])
    rollouts = Rollouts(run / "rollouts.jsonl")
    head, _ = parsed(rollouts.chunk(0))
    source = head["source"]
    whole = json.dumps(rollout(iteration=2, prompt_id="b"))
    with (run / "rollouts.jsonl").open("a") as file:
        file.write(whole[:50])
    assert parsed(rollouts.chunk(1, source))[0]["rows"] == []  # the line is being written
    with (run / "rollouts.jsonl").open("a") as file:
        file.write(whole[50:] + "\n")
    head, tokens = parsed(rollouts.chunk(1, source))
    assert (head["first"], head["firstPrompt"], head["damaged"]) == (1, 1, [])
    assert head["prompts"] == [["b", [["user", "Say hello."]]]]
    assert [row[:2] for row in head["rows"]] == [[2, 1]]
    assert tokens == [TOKENS]
    assert len(parsed(rollouts.chunk(0, source))[0]["rows"]) == 2


@pytest.mark.parametrize("shorter", [True, False])
def test_a_file_that_was_replaced_is_read_again(shorter: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [rollout(), rollout()])
    rollouts = Rollouts(run / "rollouts.jsonl")
    head, _ = parsed(rollouts.chunk(0))
    if shorter:
        (run / "rollouts.jsonl").write_text("")
    else:
        (run / "rollouts.jsonl").rename(run / "kept.jsonl")
    add_rows(run, [rollout(iteration=7)])
    again, _ = parsed(rollouts.chunk(2, head["source"]))
    assert again["source"] != head["source"]
    assert (again["first"], [row[0] for row in again["rows"]]) == (0, [7])


def test_curves_count_iterations_from_one(tmp_path: Path) -> None:
    """Those of CSVLogger, and those of TensorBoard where there is no table."""
    table, board = CSVLogger(tmp_path, "", "table"), TensorBoardLogger(str(tmp_path), "", "board")
    for logger in (table, board):
        for step in range(3):
            logger.log_metrics({"train/reward": step / 2, "train/kl": float("nan") if step == 1 else 1.0}, step)
        logger.log_metrics({"val/reward": 0.25, "epoch": 1.0}, 2)
        logger.save()
    board.experiment.flush()
    expected = {
        "train/kl": ([1, 3], [1.0, 1.0]),
        "train/reward": ([1, 2, 3], [0.0, 0.5, 1.0]),
        "val/reward": ([3], [0.25]),
    }
    assert read_curves(tmp_path / "table") == expected
    assert read_curves(tmp_path / "board") == expected
    assert read_curves(tmp_path) == {}
    before = stamp(tmp_path / "table")
    table.log_metrics({"train/reward": 0.0}, 4)
    table.save()
    assert stamp(tmp_path / "table") != before


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    lines = "".join(f"{step},{step % 2}\n" for step in range(1_000))
    run = write_run(tmp_path / "run", [], f"step,x/y\n{lines}1000,")  # the last line is being written
    steps, values = read_curves(run)["x/y"]
    assert len(steps) == 335  # both ends, and 333 means of the 998 points between them
    assert [steps[0], steps[1], steps[-1]] == [1, 3, 1000]
    assert [values[0], values[1], values[-1]] == [0, 0.6667, 1]
