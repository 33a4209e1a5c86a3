"""Files that version 0.1 wrote still work: model files chat and score, checkpoints resume."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.command_line import rlchat
from prove.runs import QUIET, last_checkpoint, metrics

from rlchat import ChatInterface, LearnedQuality
from rlchat.conversation import Conversation, Message
from rlchat.rewards import Reply

FILES = Path(__file__).parents[1] / "data" / "v0_1"
SHAPE = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
FIT = [
    *QUIET,
    "--model.base_model",
    json.dumps(SHAPE),
    "--model.tiktoken_encoding=bytes.tiktoken",
    "--model.max_length=64",
    "--data.path=conversations.jsonl",
    "--data.batch_size=4",
    "--data.val_fraction=0.2",
    "--data.max_val_prompts=4",
    "--trainer.limit_train_batches=4",
    "--trainer.max_epochs=2",
    "--trainer.val_check_interval=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_model_summary=false",
    "--sample_responses.count=2",
    "--best_model.save_last_every=1",
]
FACTORS = [
    {"class_path": "rlchat.LearnedQuality", "init_args": {"bundle": "reward_model.pt", "device": "cpu"}},
    {"class_path": "rlchat.rewards.MissingEnd", "init_args": {"weight": 0.5}},
]
PPO = [
    "--model=rlchat.PPOModule",
    "--model.reward=rlchat.Reward",
    "--model.reward.factors",
    json.dumps(FACTORS),
    "--model.max_new_tokens=8",
    "--model.learning_rate=1e-3",
    "--model.ppo_epochs=2",
    "--model.minibatches=2",
    "--model.kl_target=0.5",
    "--model.kl_horizon=100",
]


@pytest.fixture
def files(workplace: Path) -> Path:
    """A working directory with copies of the files of version 0.1."""
    shutil.copytree(FILES, workplace, dirs_exist_ok=True)
    return workplace


def test_a_policy_model_file_chats() -> None:
    chat = ChatInterface(FILES / "ppo_model.pt", seed=3)
    replies = [chat.generate_response(text, max_new_tokens=12) for text in ("What comes after 3?", "And then?")]
    assert [message.role for message in chat.history] == ["user", "assistant"] * 2
    assert [message.text for message in chat.history[1::2]] == replies
    assert len(replies[0]) > 3


def test_a_reward_model_file_scores() -> None:
    factor = LearnedQuality(str(FILES / "reward_model.pt"), device="cpu")
    prompt = Conversation((Message("user", "What comes after 3?"),))
    scores = factor([prompt, prompt], [Reply("It is 4.", 9, True), Reply("No.", 4, True)])
    # The responses of version 0.1.
    torch.testing.assert_close(scores, torch.tensor([0.0041624, -0.0157756]), atol=1e-5, rtol=0)


def test_an_sft_checkpoint_resumes_and_finishes(files: Path) -> None:
    rlchat("fit", "--model=rlchat.SFTModule", *FIT, "--ckpt_path=sft.ckpt")
    check_finished(files, "sft.ckpt")
    assert (files / "checkpoints" / "sft_model.pt").exists()


@pytest.mark.slow
def test_a_ppo_checkpoint_resumes_and_finishes(files: Path) -> None:
    before = torch.load("ppo.ckpt", weights_only=True)["rlchat"]
    assert before["tokens"] == 96
    rlchat("fit", *PPO, *FIT, "--ckpt_path=ppo.ckpt")
    after = check_finished(files, "ppo.ckpt")["rlchat"]
    assert (before["iterations"], before["episodes"]) == (3, 12)
    assert (after["iterations"], after["episodes"]) == (8, 32)
    coefficients = [value for _, name, value in metrics(files) if name == "train/kl_coef"]
    assert len(coefficients) == 5
    assert coefficients[0] == pytest.approx(before["kl_coef"])
    assert all(later < earlier for earlier, later in pairwise(coefficients))  # KL below 0.5
    assert ChatInterface("checkpoints/rl_chat_model_tiktoken.pt", seed=0).generate_response("Hi", max_new_tokens=12)


def check_finished(folder: Path, start: str) -> dict[str, dict[str, float]]:
    """The last checkpoint of the resumed run: all eight batches are done, and the weights have moved and are finite."""
    first, last = torch.load(folder / start, weights_only=True), last_checkpoint(folder)
    assert first["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["started"] == 3
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 8
    assert first["state_dict"].keys() == last["state_dict"].keys()
    name = "model.backbone.transformer.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first["state_dict"][name], last["state_dict"][name])
    assert all(tensor.isfinite().all() for tensor in last["state_dict"].values() if tensor.is_floating_point())
    return last
