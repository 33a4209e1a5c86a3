"""What kept outputs of frozen layers earn: CPU seconds of PPO iterations with and without them, in one run.

    OMP_NUM_THREADS=1 python benchmarks/frozen_layers.py --base-model FOLDER --train-layers 6

Each iteration samples 4 responses of at most 48 tokens to each of 8 questions, evaluates them under the policy and the
reference model, and takes 4 passes of 4 optimizer steps (RLOO). Every second iteration runs all layers in every pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from rlchat import PPOModule
from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import PromptBatch
from rlchat.rewards import Reward, TooLong
from rlchat.utils.padding import pad

QUESTIONS = (
    "What is the capital of France?",
    "Explain in a few words why the sky is blue.",
    "How do I boil an egg so that the yolk stays soft?",
    "Write a short poem about the sea.",
    "My laptop does not start any more. What should I check first?",
    "Name three rivers in South America.",
    "What is the difference between a list and a tuple in Python?",
    "Can you recommend a book for a long train journey?",
)


class Timed(PPOModule):
    """Measures the evaluation and the update of each iteration, and skips frozen layers in every second one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: dict[tuple[str, bool], list[float]] = {}

    def measured(self, part: str, run: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = run()
        key = part, bool(self.frozen_layers.can_skip)
        self.seconds.setdefault(key, []).append(time.process_time() - began)
        return result

    def evaluate_transcript(self, transcript: Any) -> Any:
        self.frozen_layers.can_skip = self.iterations % 2 == 0
        return self.measured("evaluation", lambda: super(Timed, self).evaluate_transcript(transcript))

    def update(self, *arguments: Any) -> Any:
        return self.measured("update", lambda: super(Timed, self).update(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--train-layers", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--critic", choices=("none", "shared", "separate"), default="none")
    parser.add_argument("--adapter", choices=("lora",))
    options = parser.parse_args()
    learner: dict[str, Any] = {"advantage": "rloo"} if options.critic == "none" else {"critic": options.critic}
    torch.manual_seed(0)
    module = Timed(
        base_model=options.base_model,
        max_length=128,
        max_new_tokens=48,
        group_size=4,
        train_layers=options.train_layers,
        adapter=options.adapter,
        learning_rate=1e-5,
        reward=Reward([TooLong(max_words=25)]),
        **learner,
    )
    questions = tuple(Conversation((Message("user", text),)) for text in QUESTIONS)
    tokenizer = module.tokenizer
    ids, mask = pad([tokenizer.render_prompt(question).ids for question in questions], tokenizer.pad_id, "left")
    prompts = PromptBatch(ids, mask, questions, None)
    batches: DataLoader[Any] = DataLoader([prompts] * options.iterations, batch_size=None, collate_fn=lambda x: x)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet).fit(module, batches)
    for part in ("evaluation", "update"):
        kept, plain = (statistics.median(module.seconds[part, skips]) for skips in (True, False))
        print(f"{part}: CPU s per iteration {plain:.2f} all layers, {kept:.2f} kept, {plain / kept:.2f} times as fast")


if __name__ == "__main__":
    main()
