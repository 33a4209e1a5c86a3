"""One process and two, DDP and FSDP2: equal weights after every step, equal responses, equal metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.command_line import rlchat, working_in
from prove.many_processes import STAGES, compare, run, words
from prove.runs import differences, last_checkpoint, prepare, trace

from rlchat.distributed.collectives import (
    anywhere,
    gather_objects,
    global_sum,
    gradient_norm,
    greatest,
    raise_everywhere,
    take_turns,
    whole,
    whole_state,
)
from rlchat.models.model_file import load_policy

PREDICT = ["--data.predict_path=questions.txt", "--trainer.accelerator=cpu", "--data.val_batch_size=4"]
SAVING = ["--best_model.save_last_every=1", "--trainer.plugins+=keeper.Keeper"]
FEW_STEPS = "--model.minibatches=2"  # a step with FSDP2 takes longer
ROLLOUTS = ["--rollout_log.every_n_iterations=1", "--rollout_log.max_replies=5", "--rollout_log.ratio=true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs of PPO. Those with two processes follow one another in one launch."""
    folder = prepare(tmp_path_factory.mktemp("processes") / "runs")
    (folder / "questions.txt").write_text("".join(f"How about {n}?\n" for n in range(6)))
    bundle = "--model.init_from=one-ppo/checkpoints/rl_chat_model_tiktoken.pt"
    predict = ["predict", *PREDICT, "--model=rlchat.PPOModule", "--model.max_new_tokens=12", bundle]
    with working_in(folder):
        rlchat(*words("one-ppo", "ppo", 1, "auto", *ROLLOUTS))
        rlchat(*words("one-few", "ppo", 1, "auto", FEW_STEPS, *ROLLOUTS))
        rlchat(*predict, "--predictions.path=one.jsonl")
    kept = "fsdp2-few/lightning_logs/ppo/version_0/checkpoints/kept/01.ckpt"
    run(
        folder,
        [
            words("ddp-ppo", "ppo", 2, "ddp", *ROLLOUTS),
            words("fsdp2-few", "ppo", 2, "fsdp2", *SAVING, FEW_STEPS, *ROLLOUTS),
            words("fsdp2-resumed", "ppo", 2, "fsdp2", *SAVING, FEW_STEPS, "--ckpt_path", kept),
            [*predict, "--predictions.path=two.jsonl", "--trainer.devices=2", "--trainer.strategy=fsdp2"],
        ],
    )
    return folder


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of all stages with both strategies."""
    folder = prepare(tmp_path_factory.mktemp("processes") / "all")
    with working_in(folder):
        for stage in STAGES:
            rlchat(*words(f"one-{stage}", stage, 1, "auto"))
    run(
        folder,
        [
            *(words(f"ddp-{stage}", stage, 2, "ddp") for stage in STAGES),
            *(words(f"fsdp2-{stage}", stage, 2, "fsdp2", *SAVING) for stage in STAGES),
        ],
    )
    return folder


@pytest.mark.parametrize(("strategy", "name"), [("ddp", "ppo"), ("fsdp2", "few")])
def test_two_processes_train_ppo_like_one(strategy: str, name: str, runs: Path) -> None:
    compare(runs / f"one-{name}", runs / f"{strategy}-{name}", ranks=2, stage="ppo").check()


@pytest.mark.parametrize(("strategy", "name"), [("ddp", "ppo"), ("fsdp2", "few")])
def test_two_processes_log_the_rollouts_of_one(strategy: str, name: str, runs: Path) -> None:
    """The same responses in the same order, with the same numbers per token."""
    logs = [runs / f"{run}-{name}" / "lightning_logs/ppo/version_0/rollouts.jsonl" for run in ("one", strategy)]
    one, two = ([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] for log in logs)
    assert [row["iteration"] for row in one] == [n for n in (1, 2, 3) for _ in range(5)]
    for row, other in zip(one, two, strict=True):
        tokens, others = row.pop("per_token"), other.pop("per_token")
        assert tokens.pop("text") == others.pop("text")
        assert set(tokens) == {"logprob", "kl", "entropy", "advantage", "value", "ratio"}
        for column, numbers in tokens.items():
            assert others[column] == pytest.approx(numbers, rel=2e-3, abs=1e-3), column
        for number in ("reward", "kl", "value"):
            assert other.pop(number) == pytest.approx(row.pop(number), abs=1e-4)
        assert other.pop("factors") == pytest.approx(row.pop("factors"), abs=1e-5)
        assert other == row


@pytest.mark.slow
@pytest.mark.xdist_group("all_runs")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(strategy: str, stage: str, all_runs: Path) -> None:
    compare(all_runs / f"one-{stage}", all_runs / f"{strategy}-{stage}", ranks=2, stage=stage).check()
    checkpoints = list(all_runs.glob(f"{strategy}-{stage}/lightning_logs/*/version_*/checkpoints/*.ckpt"))
    assert checkpoints
    assert all(path.is_file() for path in checkpoints)


def test_the_compared_runs_cover_the_hard_cases(runs: Path) -> None:
    """Responses of unequal length, a process whose responses all end at once, an epoch that stops early."""
    first, second, third = trace(runs / "one-ppo")
    assert len({len(reply) for reply in first["drawn"]}) > 4
    assert {len(reply) for reply in second["drawn"][1::2]} == {1}
    assert max(len(reply) for reply in second["drawn"][0::2]) > 8
    steps = [line["metrics"]["train/optimizer_steps"] for line in (first, second, third)]
    assert min(steps) < 16 == max(steps)


def test_fsdp2_resumes_exactly(runs: Path) -> None:
    """From the second of three iterations."""
    assert [line["batch"] for line in trace(runs / "fsdp2-resumed")] == [3]
    whole_run, resumed = (last_checkpoint(runs / name) for name in ("fsdp2-few", "fsdp2-resumed"))
    assert differences(whole_run, resumed) == []


def test_fsdp2_builds_networks_with_weights_in_the_first_process(runs: Path) -> None:
    """DDP in every process."""
    assert int((runs / "fsdp2-few" / "built.0").read_text()) > 0
    assert (runs / "fsdp2-few" / "built.1").read_text() == "0"
    assert (runs / "ddp-ppo" / "built.0").read_text() == (runs / "ddp-ppo" / "built.1").read_text()


def test_fsdp2_saves_whole_models(runs: Path) -> None:
    """The model file of two processes, each with a part of the model, equals that of one process."""
    one, two = (
        load_policy(runs / name / "checkpoints" / "rl_chat_model_tiktoken.pt").model
        for name in ("one-few", "fsdp2-few")
    )
    for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, atol=1e-5, rtol=0, msg=name)
    assert len(list(runs.glob("fsdp2-few/checkpoints/*.pt"))) == 1
    assert all(path.is_file() for path in runs.glob("fsdp2-few/lightning_logs/*/version_*/checkpoints/*.ckpt"))


def test_fsdp2_generates_the_responses_of_one_process(runs: Path) -> None:
    one, two = ([json.loads(line) for line in (runs / name).open()] for name in ("one.jsonl", "two.jsonl"))
    assert len(one) == 6
    assert [row["reply"] for row in one] == [row["reply"] for row in two]


@pytest.mark.parametrize("name", ["ddp-ppo", "fsdp2-few"])
def test_all_processes_write_into_one_folder(name: str, runs: Path) -> None:
    assert [path.name for path in (runs / name / "lightning_logs" / "ppo").iterdir()] == ["version_0"]
    left = {path.name for path in (runs / name / "lightning_logs" / "ppo" / "version_0").iterdir()}
    assert {"config.yaml", "metrics.csv", "samples.jsonl", "checkpoints"} <= left


# ---- one process -----------------------------------------------------------------------------------------------------


def test_collectives_of_one_process_need_no_process_group() -> None:
    module: Any = SimpleNamespace(device="cpu", trainer=SimpleNamespace(world_size=1))
    assert global_sum(module, 3).item() == 3
    assert greatest(module, 7) == 7
    assert anywhere(module, torch.tensor([False, True]))
    assert not anywhere(module, False)
    assert gather_objects("x") == ["x"]
    raise_everywhere(module, None)
    with pytest.raises(KeyError, match="here"):
        raise_everywhere(module, KeyError("here"))


def test_take_turns_restores_the_global_order() -> None:
    assert take_turns([["a", "c", "e"], ["b", "d"]]) == ["a", "b", "c", "d", "e"]
    assert take_turns([["a1", "a2", "c1", "c2"], ["b1", "b2"]], block=2) == ["a1", "a2", "b1", "b2", "c1", "c2"]


def test_an_unsharded_tensor_is_already_whole() -> None:
    layer = torch.nn.Linear(2, 1)
    assert whole(layer.weight) is layer.weight
    assert {name: value.shape for name, value in whole_state(layer).items()} == {"weight": (1, 2), "bias": (1,)}
    layer(torch.tensor([3.0, 4.0])).backward()
    assert gradient_norm(layer.parameters()).item() == pytest.approx(26**0.5)  # of 3, 4 and 1
