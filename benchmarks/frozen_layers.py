"""What kept outputs of frozen layers earn: CPU seconds of the parts of a PPO iteration with and without them.

    OMP_NUM_THREADS=1 python benchmarks/frozen_layers.py --base-model FOLDER --train-layers 6

One rollout of 4 responses of at most 48 tokens to each of 8 questions (RLOO) is evaluated under policy and reference
model, and trained on in passes of 4 optimizer steps. Passes with kept outputs and with all layers alternate.
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
from rlchat.ppo.module import Iteration
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
    """Samples once; measures the evaluation and the passes of the update with (True) and without kept outputs."""

    rounds: int
    seconds: dict[tuple[str, bool], list[float]]

    def measured(self, part: str, keeps: bool, run: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = run()
        self.seconds.setdefault((part, keeps), []).append(time.process_time() - began)
        print(f"{part}, {'kept' if keeps else 'all layers'}: {self.seconds[part, keeps][-1]:.2f} CPU s", flush=True)
        return result

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seconds = {}
        with torch.no_grad():
            repeated = batch.repeated(self.options.group_size)
            transcript = self.sample_transcript(repeated, self.global_rows(len(repeated.ids)), stream=0)
            self.evaluate_transcript(transcript)  # the first pass checks the family
            rollouts = {}
            for keeps in (True, False):
                self.frozen_layers.can_skip = keeps
                rollouts[keeps] = self.measured("evaluation", keeps, lambda: self.evaluate_transcript(transcript))
        scores = torch.randn(len(rollouts[True].replies))
        print(f"{len(scores)} responses, {int(transcript.attention_mask.sum())} tokens", flush=True)
        for _ in range(self.rounds):
            for keeps, rollout in rollouts.items():
                rewards = self.token_rewards(rollout, scores)
                iteration = Iteration(rollout, {}, scores, rewards, *self.compute_advantages(rollout, rewards))
                self.measured("pass of the update", keeps, lambda iteration=iteration: self.update(iteration, None))
        self.lr_schedulers().step()  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--train-layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
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
        ppo_epochs=1,
        reward=Reward([TooLong(max_words=25)]),
        **learner,
    )
    module.rounds = options.rounds
    questions = tuple(Conversation((Message("user", text),)) for text in QUESTIONS)
    tokenizer = module.tokenizer
    ids, mask = pad([tokenizer.render_prompt(question).ids for question in questions], tokenizer.pad_id, "left")
    prompts = PromptBatch(ids, mask, questions, None)
    batches: DataLoader[Any] = DataLoader([prompts], batch_size=None, collate_fn=lambda x: x)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet).fit(module, batches)
    for part in ("evaluation", "pass of the update"):
        kept, plain = (statistics.median(module.seconds[part, keeps]) for keeps in (True, False))
        print(f"{part}: {plain:.2f} CPU s with all layers, {kept:.2f} kept, {plain / kept:.2f} times as fast")


if __name__ == "__main__":
    main()
