"""`rlchat demo --real --rankings`: SFT, a reward model and PPO on a real chat model, with people's rankings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rlchat.data.formats import ranked_pairs
from rlchat.demo.real.main import CHECKPOINTS, MODEL, SHOWN, RealDemo, write_report
from rlchat.demo.real.measure import Sampled, control_beside, is_correct, mean_kl, perplexity, sample_replies
from rlchat.demo.real.pairs import Score, length_score, pair_figures, read_rankings
from rlchat.demo.real.tables import show_control, show_scored_replies, show_stages
from rlchat.models.model_file import PolicyBundle, load_policy
from rlchat.rewards import Reward, words

SFT_MODEL = CHECKPOINTS / "sft_model.pt"
REPORT = CHECKPOINTS / "rankings_report.json"
ASKED = 48
"""Held-out prompts to which each model replies."""

_REWARD_SEEDS = ("seed_everything", "data.seed")  # a reward model samples nothing
_FAST = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--data.batch_size=2"]
_FAST_SFT = [*_FAST, "--model.max_new_tokens=8"]
_FAST_PPO = [*_FAST_SFT, "--data.max_val_prompts=4"]


@dataclass(frozen=True, slots=True)
class Replies:
    """The replies of one model to held-out prompts (temperature 1) and to the control questions (greedy)."""

    sampled: list[Sampled]
    control: list[Sampled]
    perplexity: float

    def figures(self, reward: Reward) -> dict[str, float]:
        """The figures of the report; the score is that of the reward model, in standard deviations."""
        parts = reward.breakdown([s.prompt for s in self.sampled], [s.reply for s in self.sampled])
        found: dict[str, float | Tensor] = {
            "perplexity": self.perplexity,
            "reward": torch.stack(list(parts.values())).sum(0).mean(),
            "score": parts["learned_quality"].mean(),
            "words": mean(len(words(s.reply.text)) for s in self.sampled),
            "truncated": mean(not s.reply.ended for s in self.sampled),
            "control_correct": sum(map(is_correct, self.control)),
        }
        return {name: round(float(value), 4) for name, value in found.items()}


class RankingsDemo(RealDemo):
    """One run of the three stages, each with held-out figures before and after it.

    The arguments and errors are those of :class:`RealDemo`.
    """

    def __init__(self, console: Console, seed: int, threads: int | None, fast: bool) -> None:
        super().__init__(console, seed, threads, fast)
        self.rankings = read_rankings("held_out_rankings.jsonl")[: 4 if fast else None]

    def run(self) -> None:
        """Trains and measures; then the report and the tables."""
        disable_progress_bar()  # of loading weights
        began, used = time.monotonic(), time.process_time()
        self.title("1 of 3: supervised fine-tuning", "The model learns to imitate the replies that people ranked best.")
        _, sft = self.fit("rankings-sft", ["rankings.jsonl"], [self.base_option], fast=_FAST_SFT)
        self.title("2 of 3: reward model", "It learns from the rankings which replies people prefer.")
        _, trained = self.fit("rankings-reward", ["rankings.jsonl"], fast=_FAST, seeds=_REWARD_SEEDS)
        self.title("3 of 3: PPO", "The model learns to give complete replies that the reward model scores higher.")
        cli, ppo = self.fit("rankings-ppo", ["train.jsonl"], fast=_FAST_PPO)
        ppo["iterations"] = int(cli.model.iterations)
        reward = cli.model.reward
        del cli  # frees the memory of three networks
        self.title("Held-out figures", "Prompts, rankings and questions that training does not use.")
        report = {
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "training": {"sft": sft, "reward": trained, "ppo": ppo},
            **self.figures(reward),
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
        }
        write_report(REPORT, report)
        show_scored_replies(self.console, report["replies"], SHOWN)
        show_control(self.console, report["control"])
        show_stages(self.console, report)
        commands = {
            "tensorboard --logdir lightning_logs": "training curves of all three stages",
            "rlchat demo --real --rankings --seed 1": "the same with another seed",
        }
        self.show_next_steps(REPORT, commands)

    def figures(self, reward: Reward) -> dict[str, Any]:
        """The part of the report that is measured after training, with the ``reward`` of PPO."""
        learned = reward.factors["learned_quality"]
        pairs = {
            "prompts": len(self.rankings),
            "pairs": sum(len(ranked_pairs(prompt)) for prompt in self.rankings),
            "reward_model": pair_figures(self.rankings, learned, seed=self.seed),
            "longer_reply": pair_figures(self.rankings, length_score, seed=self.seed),
        }
        base, sft = self.replies(self.base()), self.replies(load_policy(SFT_MODEL, self.device))
        tuned = load_policy(MODEL, self.device)
        ppo = self.replies(tuned)
        kl = mean_kl(tuned, load_policy(SFT_MODEL, self.device), ppo.sampled)
        policies = {"base": base, "sft": sft, "ppo": ppo}
        figures = {name: replies.figures(reward) for name, replies in policies.items()}
        figures["ppo"]["kl"] = round(kl, 3)
        return {
            "pairs": pairs,
            "policies": figures,
            "control": control_beside(base.control, ppo.control),
            "replies": scored_beside(sft.sampled, ppo.sampled, learned),
        }

    def replies(self, bundle: PolicyBundle) -> Replies:
        """What one model replies."""
        return Replies(
            sample_replies(bundle, self.held_out[:ASKED], temperature=1.0, seed=self.seed),
            sample_replies(bundle, self.control, temperature=0.0),
            perplexity(bundle, self.held_out),
        )


def scored_beside(before: list[Sampled], after: list[Sampled], score: Score) -> list[dict[str, Any]]:
    """Each prompt with the replies of two models and their scores."""

    def scored(samples: list[Sampled]) -> list[dict[str, Any]]:
        scores = score([s.prompt for s in samples], [s.reply for s in samples]).tolist()
        return [{"reply": s.reply.text, "score": round(x, 3)} for s, x in zip(samples, scores, strict=True)]

    return [
        {"prompt": sample.prompt.messages[-1].text, "before": old, "after": new}
        for sample, old, new in zip(before, scored(before), scored(after), strict=True)
    ]
