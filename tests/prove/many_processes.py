"""One process and many give the same result: weights after each optimizer step, responses, curves.

python -m prove.many_processes      (`make prove` runs it)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prove.runs import QUIET, complete, metrics, prepare, steps, trace

ROWS = 12  # prompts per global batch
COPIES = 2  # responses per prompt
DECODER = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# No dropout: each process has its own random numbers for it, which differ from those of a single process.
ENCODER = {
    "model_type": "distilbert",
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
NEW = ["--model.tiktoken_encoding=rlchat_1k", "--model.max_length=96"]
STAGES = {
    "sft": [
        "--model=rlchat.SFTModule",
        "--model.base_model",
        json.dumps(ENCODER),
        *NEW,
        "--trainer.gradient_clip_val=0.1",
    ],
    "reward": ["--model=rlchat.RewardModelModule", "--model.base_model", json.dumps(DECODER), *NEW],
    # Dropout is off, and there are as many pairs as rows.
    "dpo": ["--model=rlchat.DPOModule", "--model.base_model", json.dumps(ENCODER), "--model.learning_rate=1e-3", *NEW],
    # 12 rows in 8 minibatches are one or two each, so one of two processes sometimes has none; `target_kl` stops
    # passes; conversations are mixed in.
    "ppo": [
        "--config=smoke",
        "--model.minibatches=8",
        "--model.learning_rate=3e-3",
        "--model.target_kl=0.01",
        "--model.kl_target=0.5",
        "--model.kl_horizon=100",
        "--model.whiten_rewards=true",
        "--model.sft_coef=0.1",
        "--trainer.callbacks.unequal=true",
    ],
    "critic": [
        "--config=smoke",
        "--model.critic=separate",
        "--model.critic_warmup=1",
        "--model.micro_batch_size=2",
        "--model.kl_in=loss",
        "--model.kl_kind=k3",
        "--trainer.callbacks.unequal=true",
    ],
    "grpo": [
        "--config=smoke",
        "--model.advantage=grpo",
        f"--model.group_size={COPIES}",
        "--model.minibatches=5",
        "--model.sft_coef=0.1",
        "--model.micro_batch_size=1",
        "--trainer.callbacks.unequal=true",
    ],
    # The mean and the variance of the rewards to go are those of all processes.
    "reinforce_pp": [
        "--config=smoke",
        "--model.advantage=reinforce_pp",
        "--model.gamma=0.9",
        "--trainer.callbacks.unequal=true",
    ],
    # Two adapters on frozen weights, which the policy, the reference model and the critic share.
    "lora": [
        "--config=smoke",
        "--model.adapter=lora",
        "--model.lora_rank=4",
        "--model.critic=separate",
        "--model.gradient_checkpointing=true",
        "--model.sft_coef=0.1",
        "--trainer.callbacks.unequal=true",
    ],
    # The first layer runs once per rollout.
    "layers": [
        "--config=smoke",
        "--model.train_layers=1",
        "--model.critic=separate",
        "--model.micro_batch_size=2",
        "--trainer.callbacks.unequal=true",
    ],
    # Some conversations continue when all those of another process are finished.
    "turns": ["--config=smoke", "--model.turns=3", "--model.max_new_tokens=8"],
}


def words(name: str, stage: str, ranks: int, scale: str, *more: str) -> list[str]:
    """The command line of a run with the recipe ``scale``, whose outputs are in the folder ``name``."""
    return [
        "fit",
        *QUIET,
        "--trainer.callbacks+=witness.Witness",
        "--trainer.callbacks.dump=true",
        *STAGES[stage],
        *([f"--config=scale/{scale}"] if ranks > 1 else []),
        "--trainer.accelerator=cpu",
        f"--data.path={'turns' if stage == 'turns' else 'talk'}.jsonl",
        f"--data.batch_size={ROWS // ranks}",
        f"--data.val_batch_size={8 // ranks}",
        "--data.val_fraction=0.3",
        "--trainer.limit_train_batches=4",
        "--trainer.limit_val_batches=1.0",
        "--trainer.max_epochs=1",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={name}",
        f"--best_model.folder={name}/checkpoints",
        f"--trainer.devices={ranks}",
        *more,
    ]


def run(folder: Path, runs: Sequence[Sequence[str]], seconds: float = 600) -> None:
    """Several runs one after the other, in the same processes."""
    complete(folder, [json.dumps([list(words) for words in runs])], seconds, "prove.several")


@dataclass
class Differences:
    """The largest differences between a run and a run of one process with the same global batches."""

    steps: int
    between_ranks: float  # of weights, after any step
    weights: float  # of any weight, after any step
    curves: float  # of any value in metrics.csv, divided by its absolute value or 1, whichever is larger

    def check(self) -> None:
        """Raises AssertionError if they are larger than rounding."""
        assert self.between_ranks == 0
        assert self.weights <= 1e-5
        assert self.curves <= 1e-5

    def __str__(self) -> str:
        return (
            f"after each of {self.steps} optimizer steps the ranks' weights differ by {self.between_ranks:.1g} and "
            f"from one process's by {self.weights:.1g} at most; the curves by {self.curves:.1g}"
        )


def compare(one: Path, many: Path, ranks: int, stage: str) -> Differences:
    """``many`` of ``ranks`` processes against ``one``; raises AssertionError if they did not take the same steps."""
    alone, together = steps(one), steps(many)
    assert len(alone) == len(together) > 4, (len(alone), len(together))
    first, *others = (trace(many, rank) for rank in range(ranks))
    drawn = trace(one)[0]["drawn"]
    merged = [other[0]["drawn"] for other in (first, *others)]
    if stage != "turns":  # with turns, the last samples only contain the conversations that continued
        copies = COPIES if stage == "grpo" else 1
        prompts = range(len(drawn) // copies)
        rows = [merged[p % ranks][p // ranks * copies + copy] for p in prompts for copy in range(copies)]
        assert drawn == rows, "other replies in the first iteration"
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert untimed(mine) == untimed(theirs), "metrics differ between ranks"
    expected = {(step, name): value for step, name, value in metrics(one)}
    found = {(step, name): value for step, name, value in metrics(many)}
    assert expected.keys() == found.keys()
    assert len(found) > 20
    return Differences(
        steps=len(alone) - 1,
        between_ranks=largest((w[0][k] - v[k]).abs().max() for w in together.values() for v in w[1:] for k in v),
        weights=largest((together[i][0][k] - v[0][k]).abs().max() for i, v in alone.items() for k in v[0]),
        curves=largest(abs(found[key] - value) / max(abs(value), 1) for key, value in expected.items()),
    )


def untimed(line: dict[str, dict[str, float]]) -> dict[str, float]:
    """The metrics of a line of a trace, without measurements of time."""
    return {name: value for name, value in line["metrics"].items() if not name.startswith(("time/", "perf/"))}


def largest(numbers: Iterable[object]) -> float:
    """The maximum as a float; NaN if there is a NaN among them."""
    values = [float(x) for x in numbers]  # type: ignore[arg-type]
    return max(values, key=lambda x: float("inf") if x != x else x)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = prepare(Path(place, "runs"))
        run(folder, [words(f"one-{stage}", stage, 1, "auto") for stage in STAGES])
        for ranks, strategy in ((2, "ddp"), (4, "ddp"), (2, "fsdp2"), (4, "fsdp2")):
            run(folder, [words(f"{ranks}-{strategy}-{stage}", stage, ranks, strategy) for stage in STAGES], 900)
            for stage in STAGES:
                found = compare(folder / f"one-{stage}", folder / f"{ranks}-{strategy}-{stage}", ranks, stage)
                print(f"{stage} on {ranks} processes, {strategy}: {found}", flush=True)
                found.check()


if __name__ == "__main__":
    main()
