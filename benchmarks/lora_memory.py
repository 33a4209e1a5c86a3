"""Peak memory and time of PPO: full fine-tuning with a separate critic, LoRA, and the last layers.

    python benchmarks/lora_memory.py --base-model FOLDER
    python benchmarks/lora_memory.py            (random weights with the shape of SmolLM2-135M)

With a base model, PPO with a reward model of the same base is measured too: merged, with all weights of its own, and as
an adapter that shares the policy's frozen weights.

Each configuration runs in a separate process: two iterations with one pass over the rollout. On a CPU, the peak is the
resident memory of the process minus that after the imports; on a GPU, it is the memory that PyTorch allocated. The time
is in CPU seconds. The second column compares a configuration with the first one in the table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The shape of SmolLM2-135M, apart from its vocabulary: gpt2 has 50,257 tokens, SmolLM2 49,152.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LORA = {"adapter": "lora", "lora_rank": 16}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full, separate critic": {"critic": "separate"},
    "full, separate critic, gradient checkpointing": {"critic": "separate", "gradient_checkpointing": True},
    "lora": LORA,
    "lora, gradient checkpointing": {**LORA, "gradient_checkpointing": True},
    "lora, separate critic": {**LORA, "critic": "separate"},
    "lora, q_proj and v_proj": {**LORA, "lora_targets": ["q_proj", "v_proj"]},
    "last 4 layers": {"train_layers": 4},
}
# PPO with LoRA, and a reward model in this file.
REWARD_MODELS = {
    "lora, reward model": "merged.pt",
    "lora, reward model that shares weights": "adapter.pt",
}


def measure(
    options: dict[str, Any], base_model: str, reward_model: str, batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """Peak memory in MB and CPU seconds of two iterations of PPO."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from rlchat import PPOModule
    from rlchat.conversation import Conversation, Message
    from rlchat.data.datamodule import PromptBatch
    from rlchat.rewards import LearnedQuality, Reward, TooShort

    cuda = torch.cuda.is_available()
    before = 0 if cuda else peak_mb()
    own: dict[str, Any] = (
        {"base_model": base_model} if base_model else {"base_model": SHAPE, "tiktoken_encoding": "gpt2"}
    )
    torch.manual_seed(0)
    module = PPOModule(
        **own,
        max_length=prompt_tokens + new_tokens,
        max_new_tokens=new_tokens,
        ppo_epochs=1,
        minibatches=1,
        reward=Reward([LearnedQuality(reward_model) if reward_model else TooShort()]),
        **options,
    )
    ids = torch.randint(1000, (batch, prompt_tokens))
    conversations = tuple(Conversation((Message("user", "Hello"),)) for _ in range(batch))
    prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), conversations, None)
    loader: DataLoader[Any] = DataLoader([prompts] * 2, batch_size=None, collate_fn=lambda rows: rows)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(module, loader)
    seconds = time.process_time() - start
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else peak_mb() - before
    return {"peak_mb": peak, "seconds": seconds}


def make_reward_models(base_model: str, folder: str, max_length: int) -> None:
    """Writes the files of ``REWARD_MODELS`` to ``folder``: one untrained reward model, merged and as an adapter."""
    from rlchat import RewardModelModule
    from rlchat.models.model_file import RewardBundle, save_bundle

    module = RewardModelModule(base_model=base_model, max_length=max_length, merge_adapter=False, **LORA)
    bundle = RewardBundle(module.model, module.tokenizer, module.max_length, base=module.base)
    for name in REWARD_MODELS.values():
        save_bundle(Path(folder, name), bundle, merge_adapter=name == "merged.pt")


def peak_mb() -> float:
    """The peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default="")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=48)
    names = (*CONFIGURATIONS, *REWARD_MODELS)
    parser.add_argument("--only", choices=names, action="append", help="measure this configuration only")
    parser.add_argument("--one", choices=(*names, "make"), help=argparse.SUPPRESS)
    parser.add_argument("--reward-models", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.batch, options.prompt_tokens, options.new_tokens)
    if options.one == "make":
        make_reward_models(options.base_model, options.reward_models, sum(sizes[1:]))
    elif options.one in REWARD_MODELS:
        path = str(Path(options.reward_models, REWARD_MODELS[options.one]))
        print(json.dumps(measure(LORA, options.base_model, path, *sizes)))
    elif options.one:
        print(json.dumps(measure(CONFIGURATIONS[options.one], options.base_model, "", *sizes)))
    else:
        compare(options.only or (names if options.base_model else CONFIGURATIONS))


def compare(names: Iterable[str]) -> None:
    """Measures each of ``names`` in a process of its own, and prints a table."""
    first: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--reward-models", folder, "--one"]
        if any(name in REWARD_MODELS for name in names):
            subprocess.run([*command, "make"], check=True)
        print(f"{'configuration':<48} {'peak MB':>8} {'of first':>8} {'CPU s':>8}")
        for name in names:
            run = subprocess.run([*command, name], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(run.stdout.splitlines()[-1])
            first = first or found["peak_mb"]
            share = found["peak_mb"] / first
            print(f"{name:<48} {found['peak_mb']:>8.0f} {share:>8.0%} {found['seconds']:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
