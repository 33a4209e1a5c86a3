"""End to end: every shipped recipe, and from a data file to a model to chat with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command_line import TINY, rlchat, write_talk
from transformers import DistilBertConfig, DistilBertModel

from rlchat import ChatInterface
from rlchat.cli.recipes import recipes
from rlchat.models.model_file import load_policy

NEW_EMBEDDINGS = ["--model.new_embeddings", "true"]  # the tiny model has no tokenizer


def tiny_distilbert(folder: Path) -> str:
    """A small model of the architecture of ``distilbert-base-uncased``, without a download."""
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=60, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=64)
    DistilBertModel(config).save_pretrained(folder)
    return str(folder)


# Those of scale/ go over another one, and are run on several processes in test_processes.py and prove/two_nodes.py.
# Those for a pretrained model are run in cli/test_model_recipes.py, demo/real/test_demo.py and test_rankings.py.
# Those of reasoning/ are run in tasks/test_recipe.py.
ELSEWHERE = {"demo/real", "distilbert", "gpt2", "llama-lora", "qwen-lora", "smollm2-lora"}
ELSEWHERE |= {"demo/rankings-ppo", "demo/rankings-reward", "demo/rankings-sft", "reasoning/ppo", "reasoning/sft"}


@pytest.mark.parametrize(
    "name", sorted(name for name in recipes() if not name.startswith("scale/") and name not in ELSEWHERE)
)
def test_every_recipe_runs(name: str, workplace: Path, trained: Path) -> None:
    shutil.copytree(trained / "checkpoints", "checkpoints")
    shutil.copytree(trained / "data", "data")
    words = ["fit", "--config", name, "--trainer.fast_dev_run=1", "--data.path", "data/demo.jsonl"]
    if name == "sft":  # this recipe downloads its base model
        words += ["--model.base_model", tiny_distilbert(workplace / "distilbert"), *TINY[2:], *NEW_EMBEDDINGS]
    if name == "ppo":  # its max_new_tokens is too large for the tiny model
        words += ["--model.max_new_tokens", "16"]
    before = {path: path.stat().st_mtime for path in Path("checkpoints").iterdir()}
    rlchat(*words)
    assert {path: path.stat().st_mtime for path in Path("checkpoints").iterdir()} == before


@pytest.mark.slow
def test_the_three_stages_on_an_encoder(workplace: Path) -> None:
    """SFT of an encoder, a reward model on its backbone, PPO with both; one file of ranked responses for all stages."""
    pairs = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No. No. No."} for n in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    brief = ["--data.path", "pairs.jsonl", "--data.batch_size=4", "--trainer.max_epochs=1"]
    brief += ["--trainer.limit_train_batches=1", "--trainer.val_check_interval=1.0"]
    words = ["--model.base_model", tiny_distilbert(workplace / "distilbert"), *TINY[2:], *NEW_EMBEDDINGS]
    rlchat("fit", "--config", "sft", *brief, *words)
    rlchat("fit", "--config", "reward", *brief)
    rlchat("fit", "--config", "ppo", *brief, "--model.max_new_tokens", "8")
    names = {"sft_model", "reward_model", "rl_chat_model_tiktoken"}
    assert {path.stem for path in Path("checkpoints").glob("*.pt")} == names
    bundle = load_policy("checkpoints/rl_chat_model_tiktoken.pt")
    assert bundle.model.backbone.transformer.config.model_type == "distilbert"
    assert bundle.model.hidden_dim == 768
    assert isinstance(ChatInterface("checkpoints/rl_chat_model_tiktoken.pt").generate_response("Hello"), str)


def test_from_a_file_to_a_chat(workplace: Path) -> None:
    """`fit` → `validate` in a new process, as a user of the installed command would → `ChatInterface`."""
    data = write_talk(workplace / "talk.jsonl")
    rlchat("fit", "--config", "smoke", "--data.path", str(data), "--data.batch_size", "2", plot=True)
    command = [sys.executable, "-m", "rlchat", "validate", "--ckpt_path", "best"]
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env={**os.environ, "PYTHONPATH": root, "COLUMNS": "80"}
    )
    assert run.returncode == 0, run.stderr
    assert "perplexity" in run.stdout
    assert run.stderr.strip() == ""  # no warnings or other messages
    reply = ChatInterface("checkpoints/rl_chat_model_tiktoken.pt").generate_response("Hello, how are you?")
    assert isinstance(reply, str)
