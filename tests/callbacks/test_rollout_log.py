"""Rollouts on disk and in TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_ppo import ONE_STEP, QUESTIONS, LetterE, fit, ppo, prompts, sequences, serve, trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlchat.callbacks.rollout_log import RolloutLog, per_token, prompt_id, rounded, token_texts
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.ppo.frozen_layers import KeptStates
from rlchat.ppo.module import Iteration
from rlchat.ppo.rollouts import Rollout
from rlchat.rewards import MissingEnd, Reply, ReplyFactor, Reward
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def test_every_few_iterations_as_lines_and_as_histograms(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, reward=Reward([LetterE(), MissingEnd(0.5)]))
    board = TensorBoardLogger(str(tmp_path), name="", version="run")
    rows = fit(module, 5, callbacks=[RolloutLog(every_n_iterations=2)], logger=[board, CSVLogger(tmp_path, "", "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1] * 8 + [3] * 8 + [5] * 8
    for iteration in (1, 3, 5):
        part = [line for line in lines if line["iteration"] == iteration]
        logged = rows[iteration - 1]
        assert [line["prompt"][-1]["content"] for line in part] == list(QUESTIONS)
        assert sum(line["reward"] for line in part) / 8 == pytest.approx(logged["train/reward"], abs=1e-5)
        assert sum(line["kl"] for line in part) / 8 == pytest.approx(logged["train/kl"], abs=1e-5)
        cut = sum(line["ended_by"] == "token limit" for line in part)
        assert cut / 8 == pytest.approx(logged["train/truncated_fraction"])
        for line in part:
            assert line["reward"] == pytest.approx(sum(line["factors"].values()))
            assert set(line["factors"]) == {"letter_e", "missing_end"}
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    names = {f"rollout/{name}" for name in ("reward", "kl", "value", "tokens", "advantage")}
    assert names <= set(events.Tags()["histograms"])
    assert {"rollout/factor_letter_e", "rollout/factor_missing_end"} <= set(events.Tags()["histograms"])
    found = events.Histograms("rollout/reward")
    assert [event.step for event in found] == [1, 3, 5]
    assert found[0].histogram_value.num == 8


def test_the_responses_of_each_validation(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, reward=Reward([LetterE(), MissingEnd(0.5)]), advantage="rloo", group_size=2)
    held_out = [serve([prompts(module.tokenizer, QUESTIONS[:5])]), serve([sequences(module.tokenizer)])]
    fitted = trainer(callbacks=[RolloutLog()], logger=CSVLogger(tmp_path, "", "run"), val_check_interval=1)
    fitted.fit(module, serve([prompts(module.tokenizer)] * 2), held_out)
    lines = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1] * 5 + [2] * 5
    last = lines[5:]
    assert [line["prompt"][-1]["content"] for line in last] == list(QUESTIONS[:5])
    assert [line["prompt_id"] for line in last] == [prompt_id(line["prompt"]) for line in lines[:5]]
    metrics = fitted.callback_metrics
    assert sum(line["reward"] for line in last) / 5 == pytest.approx(float(metrics["val/reward"]), abs=1e-5)
    assert sum(line["kl"] for line in last) / 5 == pytest.approx(float(metrics["val/kl"]), abs=1e-5)
    assert all(line["value"] is None for line in last)  # no critic
    fitted.validate(module, held_out, verbose=False)
    assert len((tmp_path / "run" / "held_out.jsonl").read_text().splitlines()) == 10


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``rollouts.jsonl``; a number that JSON does not have is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_of_many_prompts_the_same_ones_are_written_each_time(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding)
    log = RolloutLog(every_n_iterations=1, max_replies=3)
    batches = [prompts(module.tokenizer, QUESTIONS), prompts(module.tokenizer, QUESTIONS[::-1])]
    for name, batch in zip("ab", batches, strict=True):
        fit(module, 1, batch, callbacks=[log], logger=CSVLogger(tmp_path, "", name))
    first, second = ([line["prompt_id"] for line in logged(tmp_path / name)] for name in "ab")
    assert first == second[::-1]  # in the order of the rollout
    ids = {text: prompt_id([{"role": "user", "content": text}]) for text in QUESTIONS}
    assert first == [ids[text] for text in QUESTIONS if ids[text] in sorted(ids.values())[:3]]


def test_the_tokens_of_a_conversation_of_two_turns_by_hand(byte_tokenizer: ChatTokenizer) -> None:
    """Response 2 follows response 0 in the same row after a gap, in which nothing counts; response 1 is truncated."""
    index = torch.tensor([[0, 0, -1, 2], [1, -1, -1, -1]])
    end = byte_tokenizer.end_id
    rollout = Rollout(
        conversations=[Conversation((Message("user", text),)) for text in "abc"],
        replies=[Reply("x", 2, True), Reply("z", 1, False), Reply("w", 1, False)],
        ids=torch.tensor([[97, 120, end, 98, 119], [97, 122, 0, 0, 0]]),
        attention_mask=torch.tensor([[True] * 5, [True, True, False, False, False]]),
        sampled=torch.tensor([[False, True, True, False, True], [False, True, False, False, False]]),
        response_index=index,
        response_mask=index >= 0,
        old_logprobs=torch.tensor([[-1.0, -2.0, 9.0, -0.5], [-4.0, 9.0, 9.0, 9.0]]),
        ref_logprobs=torch.tensor([[-1.5, -2.25, 5.0, -0.25], [-math.inf, 5.0, 5.0, 5.0]]),
        values=torch.tensor([[0.1, 0.2, 7.0, 0.3], [0.4, 7.0, 7.0, 7.0]]),
        entropy=torch.tensor([[1.0, 2.0, 7.0, 0.123456], [0.5, 7.0, 7.0, 7.0]]),
        sampling_logprobs=torch.zeros(2, 4),
        kept=KeptStates(),
    )
    advantages = torch.tensor([[0.5, -0.5, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    seen = Iteration(rollout, {}, torch.zeros(3), torch.zeros(2, 4), advantages, torch.zeros(2, 4))
    columns = {
        "kl": rollout.old_logprobs - rollout.ref_logprobs,
        "value": rollout.values,
        "entropy": rollout.entropy,
        "advantage": advantages,
    }
    assert per_token(seen, columns, [0, 1, 2], byte_tokenizer) == {
        0: {
            "text": ["x", "<|end|>"],
            "kl": [0.5, 0.25],
            "value": [0.1, 0.2],
            "entropy": [1.0, 2.0],
            "advantage": [0.5, -0.5],
        },
        1: {"text": ["z"], "kl": [None], "value": [0.4], "entropy": [0.5], "advantage": [2.0]},
        2: {"text": ["w"], "kl": [-0.25], "value": [0.3], "entropy": [0.1235], "advantage": [1.0]},
    }
    assert list(per_token(seen, columns, [2], byte_tokenizer)) == [2]


def test_numbers_have_four_significant_digits() -> None:
    given = [0.0, 1234.56, -0.000123456, 1e21, math.nan, math.inf]
    assert [rounded(number) for number in given] == [0.0, 1235.0, -0.0001235, 1e21, None, None]


def test_the_texts_of_tokens_never_split_a_character(byte_tokenizer: ChatTokenizer) -> None:
    ids = [*"aü😀".encode(), byte_tokenizer.end_id]
    assert token_texts(ids, byte_tokenizer) == ["a", "", "ü", "", "", "", "😀", "<|end|>"]
    assert token_texts(list("ü".encode())[:1], byte_tokenizer) == ["\ufffd"]


def test_the_name_of_a_prompt() -> None:
    first = [{"role": "user", "content": "Hi"}]
    ask = {"role": "user", "content": "Why?"}
    turn = [[*first, {"role": "assistant", "content": text}, ask] for text in "ab"]
    assert len({prompt_id(prompt) for prompt in (first, *turn)}) == 3
    assert prompt_id(turn[0], turns=2) == prompt_id(turn[1], turns=2) != prompt_id(first, turns=2)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_tokens_of_a_run_add_up(critic: str, encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, critic=critic, group_size=2, **ONE_STEP)
    fit(module, 1, callbacks=[RolloutLog()], logger=CSVLogger(tmp_path, "", "run"))
    lines = logged(tmp_path / "run")
    assert len(lines) == 16
    assert len({line["prompt_id"] for line in lines}) == 8
    assert module.last_iteration is not None
    rollout = module.last_iteration.rollout
    for number, line in enumerate(lines):
        assert line["version"] == 2
        tokens, mask = line["per_token"], rollout.response_mask[number]
        assert {len(column) for column in tokens.values()} == {line["tokens"]}
        text = "".join(tokens["text"])
        assert text.removesuffix("<|end|>").strip() == line["reply"]
        assert text.endswith("<|end|>") == (line["ended_by"] == "end of turn")
        assert sum(tokens["kl"]) == pytest.approx(line["kl"], abs=2e-3)
        assert tokens["value"][0] == pytest.approx(line["value"], rel=1e-3)
        assert tokens["logprob"] == pytest.approx(rollout.old_logprobs[number][mask].tolist(), rel=1e-3)
        assert tokens["advantage"] == pytest.approx(module.last_iteration.advantages[number][mask].tolist(), rel=1e-3)
        assert all(0 < entropy < math.log(module.tokenizer.vocab_size) for entropy in tokens["entropy"])
        assert "ratio" not in tokens


def test_without_a_critic_there_is_no_value(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, advantage="rloo", group_size=2, **ONE_STEP)
    board = TensorBoardLogger(str(tmp_path), name="", version="run")
    fit(module, 1, callbacks=[RolloutLog()], logger=board)
    for line in logged(tmp_path / "run"):
        assert line["value"] is None
        assert set(line["per_token"]) == {"text", "logprob", "kl", "entropy", "advantage"}
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    assert "rollout/kl" in events.Tags()["histograms"]
    assert "rollout/value" not in events.Tags()["histograms"]


def test_the_ratio_is_that_of_the_policy_after_the_update(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, **ONE_STEP)
    fit(module, 1, callbacks=[RolloutLog(ratio=True)], logger=CSVLogger(tmp_path, "", "run"))
    assert module.last_iteration is not None
    rollout = module.last_iteration.rollout
    with torch.no_grad():
        inputs = (rollout.ids, rollout.attention_mask, rollout.sampled, rollout.response_mask)
        new = module.evaluate_tokens(module.model, *inputs).logprobs
    ratio = (new - rollout.old_logprobs).exp()
    assert (ratio - 1)[rollout.response_mask].abs().max() > 0.01
    for number, line in enumerate(logged(tmp_path / "run")):
        expected = ratio[number][rollout.response_mask[number]].tolist()
        assert line["per_token"]["ratio"] == pytest.approx(expected, rel=1e-3)


def test_tokens_are_an_option(encoding: str, tmp_path: Path) -> None:
    fit(ppo(encoding, **ONE_STEP), 1, callbacks=[RolloutLog(tokens=False)], logger=CSVLogger(tmp_path, "", "run"))
    assert all("per_token" not in line for line in logged(tmp_path / "run"))
    with pytest.raises(UserError, match=r"^RolloutLog\.ratio is a number per token: set RolloutLog\.tokens to true"):
        RolloutLog(tokens=False, ratio=True)


def test_fast_dev_run_leaves_no_files(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(ppo(encoding), 1, callbacks=[RolloutLog()], fast_dev_run=True)
    assert not list(tmp_path.rglob("rollouts.jsonl"))


class Enormous(ReplyFactor):
    """A reward far outside the bins of TensorBoard's histograms."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return 1e21


def test_an_enormous_reward_does_not_stop_the_run(encoding: str, tmp_path: Path) -> None:
    board = TensorBoardLogger(str(tmp_path), name="", version="run")
    # Without a critic, whose loss would overflow: all rewards are equal, so that the advantages are 0.
    module = ppo(encoding, reward=Reward([Enormous()]), advantage="rloo", group_size=2)
    fit(module, 1, callbacks=[RolloutLog()], logger=board)
    (line, *_) = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    assert json.loads(line)["reward"] == pytest.approx(1e21)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    assert events.Histograms("rollout/reward")[0].histogram_value.num == 16


@pytest.mark.parametrize("option", ["every_n_iterations", "max_replies"])
def test_invalid_options_are_errors(option: str) -> None:
    with pytest.raises(UserError, match=rf"^invalid value 0 for RolloutLog\.{option}: expected a positive integer$"):
        RolloutLog(**{option: 0})
