"""`rlchat data reasoning-gym` with a small package in place of reasoning-gym, and with the real one if installed."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from rlchat.__main__ import main
from rlchat.data.datamodule import DataNeeds, OASST2DataModule, PromptBatch, SequenceBatch
from rlchat.data.formats import read_trees
from rlchat.tasks.reasoning_gym import checks_of_tasks
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


class ProceduralDataset:
    """As in reasoning-gym: the base class, with the score of an exact answer."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"])


@dataclass
class LetterConfig:
    seed: int
    size: int
    letters: str = "abcdef"

    def validate(self) -> None:
        assert self.letters, "letters must not be empty"


class Upper(ProceduralDataset):
    """Write a letter as a capital."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert index < self.config.size
        letter = random.Random(self.config.seed + index).choice(self.config.letters)
        return {"question": f"The capital of {letter}?\n", "answer": letter.upper(), "metadata": {}}


class Countdown(Upper):
    """A task with several right answers."""

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0


class Unanswered(Countdown):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": "Why?", "answer": None, "metadata": {}}


class ChainSum(Countdown):
    """Sums of small numbers, whose default check is of the number."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{index} + 1 =", "answer": str(index + 1), "metadata": {}}


@pytest.fixture
def gym() -> Iterator[None]:
    """A package reasoning_gym with four tasks."""
    tasks = {"upper_case": Upper, "countdown": Countdown, "graph_color": Unanswered, "chain_sum": ChainSum}
    factory = ModuleType("reasoning_gym.factory")

    def create_dataset(name: str, **options: Any) -> ProceduralDataset:
        config = LetterConfig(**options)
        config.validate()
        return tasks[name](config)

    factory.DATASETS = {name: (task, LetterConfig) for name, task in tasks.items()}  # type: ignore[attr-defined]
    factory.ProceduralDataset = ProceduralDataset  # type: ignore[attr-defined]
    factory.create_dataset = create_dataset  # type: ignore[attr-defined]
    package = ModuleType("reasoning_gym")
    package.factory = factory  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"reasoning_gym": package, "reasoning_gym.factory": factory}):
        yield


def data(*words: str) -> int:
    return main(["data", "reasoning-gym", *words])


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_each_question_is_written_once(gym: None, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data("upper_case", "-n", "3", "-o", "a.jsonl") == 0
    assert capsys.readouterr().out == "a.jsonl: 3 different questions of upper_case; check: exact\n"
    found = rows("a.jsonl")
    assert len({row["prompt"] for row in found}) == 3
    for row in found:
        letter = row["prompt"].split()[-1][0]
        assert row == {"prompt": f"The capital of {letter}?", "answer": letter.upper(), "check": "exact"}
    assert data("upper_case", "-n", "3", "-o", "b.jsonl") == 0
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    # `A` and `a` are the same question, so there are two.
    assert data("upper_case", "-n", "50", "--set", "letters=aAbB", "--seed", "1", "-o", "c.jsonl") == 0
    assert "2 different questions of upper_case, no more than these in 1,800 draws" in capsys.readouterr().out
    assert len(rows("c.jsonl")) == 2


def test_the_rows_are_prompts_with_checks_and_with_responses_also_for_sft(gym: None, workplace: Path) -> None:
    assert data("upper_case", "-n", "3", "-o", "a.jsonl") == 0
    assert data("upper_case", "-n", "3", "--responses", "-o", "b.jsonl") == 0
    for name, learned in (("a.jsonl", 0), ("b.jsonl", 1)):
        trees, report = read_trees([Path(name)])
        assert "not supported" not in report.summary()
        for tree, row in zip(trees, rows(name), strict=True):
            (prompt,) = tree.prompts
            assert prompt.messages[-1].text == row["prompt"]
            assert [prompt.passes(text) for text in (row["answer"], f" {row['answer']}.", "x")] == [True, True, False]
            assert len(tree.threads) == learned
            assert [thread.messages[-1].text for thread in tree.threads] == [row["answer"]] * learned


def test_a_number_may_be_written_in_any_way(gym: None, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data("chain_sum", "-n", "2", "-o", "a.jsonl") == 0
    assert rows("a.jsonl")[1] == {"prompt": "1 + 1 =", "answer": "2", "check": "number"}
    assert data("chain_sum", "-n", "2", "--check", "contains", "-o", "b.jsonl") == 0
    assert rows("b.jsonl")[1]["check"] == "contains"
    assert data("upper_case", "-n", "2", "--check", "number", "-o", "c.jsonl") == 2
    assert "does not fit an answer of upper_case: answer is not a number" in capsys.readouterr().err


def test_a_task_with_several_right_answers_needs_consent(
    gym: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data("countdown", "-o", "a.jsonl") == 2
    assert "countdown has several right answers, or several ways to write one, and a row" in capsys.readouterr().err
    assert data("countdown", "-n", "2", "--one_answer", "-o", "a.jsonl") == 0
    assert rows("a.jsonl")[0]["check"] == "exact"
    capsys.readouterr()
    assert data("--list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "check exact (1):",
        "  upper_case",
        "check number (1):",
        "  chain_sum",
        "several right answers, or several ways to write one; need --one_answer (2):",
        "  countdown, graph_color",
    ]


def test_an_existing_file_stays(gym: None, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text("mine")
    assert data("upper_case", "-n", "2", "-o", "a.jsonl") == 2
    assert "a.jsonl already exists; use another name, or --force to overwrite it" in capsys.readouterr().err
    assert Path("a.jsonl").read_text() == "mine"
    assert data("upper_case", "-n", "2", "-o", "a.jsonl", "--force") == 0
    assert len(rows("a.jsonl")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["uper_case"], "reasoning-gym has no task 'uper_case'; did you mean upper_case?"),
        (["zzz"], "reasoning-gym has no task 'zzz'; `rlchat data reasoning-gym --list` prints all tasks"),
        ([], "no task is specified"),
        (["upper_case", "--set", "leters=a"], "--set leters: no such option of upper_case; did you mean letters?"),
        (["upper_case", "--set", "zz=a"], "--set zz: no such option of upper_case; it has letters"),
        (["upper_case", "--set", "letters"], "invalid value 'letters' for --set: expected KEY=VALUE"),
        (["upper_case", "--set", "letters=[a"], "invalid value '[a' for --set letters: not YAML"),
        (["upper_case", "--set", "seed=1"], "--set seed: use --seed instead"),
        (["upper_case", "--set", "size=1"], "--set size: use -n instead"),
        (["upper_case", "--set", "letters=''"], "cannot be created with --set letters=: letters must not be empty"),
        (["upper_case", "-n", "0"], "invalid value 0 for -n: expected a positive integer"),
        (["graph_color", "--one_answer"], "graph_color of reasoning-gym has questions without an answer"),
        (["upper_case", "-o", "a.txt"], "a.txt: the name of a data file must end in .jsonl"),
    ],
)
def test_an_error_is_one_sentence(
    words: list[str], message: str, gym: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if "-o" in words else ["-o", "a.jsonl"]
    assert data(*words, *output) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"rlchat: {message}") or message in line
    assert not list(workplace.iterdir())


def test_without_an_output_file_and_without_the_package(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data("upper_case") == 2
    assert "no output file is specified; add -o FILE.jsonl" in capsys.readouterr().err
    with mock.patch.dict(sys.modules, {"reasoning_gym": None, "reasoning_gym.factory": None}):
        assert data("upper_case", "-o", "a.jsonl") == 2
    message = capsys.readouterr().err
    assert "rlchat data reasoning-gym needs reasoning_gym" in message
    assert "[reasoning-gym]" in message


def test_no_stage_trains_on_a_held_out_question(gym: None, workplace: Path, byte_tokenizer: ChatTokenizer) -> None:
    assert data("chain_sum", "-n", "80", "--responses", "-o", "sums.jsonl") == 0
    needs = {
        "sft": DataNeeds("sft", byte_tokenizer, max_length=64),
        "ppo": DataNeeds("ppo", byte_tokenizer, max_length=64, max_new_tokens=4),
    }
    trained: dict[str, set[str]] = {}
    tested: dict[str, set[str]] = {}
    for stage, need in needs.items():
        # Batches of one row: PPO leaves out the rows that do not fill a batch.
        module = OASST2DataModule("sums.jsonl", 1, cache_dir=str(workplace), val_fraction=0.1, test_fraction=0.2)
        module.needs = need
        module.setup()
        loaded = [*module.train_dataloader()], [*module.test_dataloader()[0]]
        trained[stage], tested[stage] = (questions(batches, byte_tokenizer) for batches in loaded)
    everything = {row["prompt"] for row in rows("sums.jsonl")}
    assert trained["sft"] == trained["ppo"]
    assert tested["sft"] == tested["ppo"]
    assert len(tested["ppo"]) > 5
    assert not trained["ppo"] & tested["ppo"]
    assert trained["ppo"] | tested["ppo"] < everything


def questions(batches: list[PromptBatch] | list[SequenceBatch], tokenizer: ChatTokenizer) -> set[str]:
    """The questions ``N + 1 =`` in the token ids of the batches."""
    texts = [tokenizer.decode([i for i in row if i < 256]) for batch in batches for row in batch.ids.tolist()]
    return {f"{text.partition('=')[0].strip()} =" for text in texts}


# ---- the real package ------------------------------------------------------------------------------------------------


def test_the_real_task_spells_words_backward(workplace: Path) -> None:
    pytest.importorskip("reasoning_gym")
    assert data("spell_backward", "-n", "300", "--set", "min_word_len=3", "max_word_len=4", "-o", "words.jsonl") == 0
    words = [row["prompt"].split()[-1] for row in rows("words.jsonl")]
    assert all(row["answer"] == word[::-1] for row, word in zip(rows("words.jsonl"), words, strict=True))
    assert {len(word) for word in words} == {3, 4}
    assert len({word.lower() for word in words}) == 300


@pytest.mark.slow
def test_the_listed_tasks_give_the_full_score_to_one_answer_only() -> None:
    """The answers to four other questions score below 1, and what the row's check accepts scores 1."""
    factory = pytest.importorskip("reasoning_gym.factory")
    for task in (name for name, check in checks_of_tasks().items() if check is not None):
        dataset = factory.create_dataset(task, seed=0, size=20)
        entries = [dataset[i] for i in range(5)]
        for entry in entries:
            assert dataset.score_answer(entry["answer"], entry) == 1, task
            others = {other["answer"] for other in entries} - {entry["answer"]}
            assert all(dataset.score_answer(other, entry) < 1 for other in others), task
