"""Validation and test of PPO: responses to held-out prompts and their rewards, and perplexity on conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from rlchat.conversation import Conversation
from rlchat.data.datamodule import PromptBatch, SequenceBatch
from rlchat.distributed.collectives import anywhere, gather_objects
from rlchat.models.sampling import Sampling
from rlchat.ppo.rollouts import RolloutModule
from rlchat.rewards import Reply, distinct_n
from rlchat.rewards.best_of import pass_at
from rlchat.training.base import VALIDATION_STREAM


class HeldOutModule(RolloutModule):
    """The validation, test and prediction loops of PPO."""

    def on_validation_epoch_start(self) -> None:
        """Discards the responses of the last validation, and samples from the weights that are validated now."""
        self.rollout_engine.synchronize(self)
        self.held_out_rows: list[dict[str, Any]] = []
        self.held_out_prompts = 0

    def validation_step(self, batch: PromptBatch | SequenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measures accuracy and perplexity on conversations, and the reward of responses to prompts."""
        if isinstance(batch, SequenceBatch):
            self.tally_sequences(batch)
        else:
            self.tally_responses(batch)

    def tally_responses(self, batch: PromptBatch) -> None:
        """Adds the rewards, KL, lengths and correctness of responses to held-out prompts to the tally."""
        # Every validation uses the same random numbers, so that differences come from the model.
        n = 1 if self.trainer.state.fn == TrainerFn.FITTING else self.best_of
        rows = self.global_rows(len(batch.ids), self.held_out_prompts, copies=n)
        self.held_out_prompts += len(batch.ids)
        rollout = self.roll_out(batch.repeated(n), rows, stream=VALIDATION_STREAM)
        factors = self.score_responses(rollout.conversations, rollout.replies)
        self.held_out_rows += rollout.rows(factors)
        self.tally.add("reward", torch.stack(list(factors.values())).sum(0))
        for name, value in factors.items():
            self.tally.add(f"reward_{name}", value)
        self.tally.add("kl", rollout.kl)
        self.tally.add("response_length", torch.tensor([reply.tokens for reply in rollout.replies]))
        self.tally.add("truncated_fraction", torch.tensor([not reply.ended for reply in rollout.replies]))
        self.tally_answers("answer_accuracy", rollout.conversations, rollout.replies)
        if n > 1:
            self.tally_pass_at(rollout.conversations, rollout.replies, n)
        if not self.trainer.training and anywhere(self, any(c.check for c in batch.conversations)):
            greedy = Sampling(self.sampling.max_new_tokens, temperature=0.0)
            transcript = self.sample_transcript(batch, rows[::n], VALIDATION_STREAM, greedy)
            self.tally_answers("answer_accuracy_greedy", transcript.conversations, transcript.replies)

    def tally_answers(self, name: str, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> None:
        """Adds the fraction of correct responses, among the prompts that have a check."""
        correct = [float(p.passes(r.text) or 0) for p, r in zip(prompts, replies, strict=True) if p.check]
        if correct:
            self.tally.add(name, torch.tensor(correct))

    def tally_pass_at(self, prompts: Sequence[Conversation], replies: Sequence[Reply], n: int) -> None:
        """Adds pass@k of the prompts that have a check; the ``n`` responses to a prompt are adjacent."""
        correct = [bool(p.passes(r.text)) for p, r in zip(prompts, replies, strict=True) if p.check]
        for k, values in pass_at(correct, n).items() if correct else ():
            self.tally.add(f"pass@{k}", torch.tensor(values))

    def held_out_metrics(self) -> dict[str, float]:
        """Means over all responses of all processes, and the fraction of distinct bigrams. A collective."""
        metrics = super().held_out_metrics()
        parts = gather_objects([row["reply"] for row in self.held_out_rows])
        replies = [reply for part in parts for reply in part]
        if replies:
            metrics["distinct_2"] = distinct_n(replies, 2)
        return metrics

    def predicted_rewards(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> list[dict[str, Any]]:
        """The reward of each predicted response, in total and by factor."""
        factors = self.score_responses(prompts, replies)
        rows = [{name: float(value[i]) for name, value in factors.items()} for i in range(len(replies))]
        return [{"reward": sum(row.values()), "factors": row} for row in rows]
