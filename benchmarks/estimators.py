"""Advantage estimators and DPO on one task: reward after equal episodes and after equal seconds, over seeds.

    python -m benchmarks.estimators --plot estimators.png      (ten seeds; about a quarter of an hour of one core)
    python -m benchmarks.estimators --seeds 2 --tuning-seeds 1 --out FOLDER

The task is that of `benchmarks/against_trl`, size T: a GPT-2 with random weights, 2 layers of width 64 and a vocabulary
of 512, is rewarded for the fraction of its 16 response tokens in the first eighth of the vocabulary. Each run has 640
episodes: 10 iterations of 64 responses for PPO, to 64 prompts, or to 16 prompts with 4 responses each for RLOO and
GRPO. More episodes bring all estimators to the highest reward. DPO gets the same number of responses of the initial
policy, two to a prompt, and learns from the pairs that the true reward ranks. It makes as many optimizer steps as PPO.

The learning rate of each arm (and β of DPO) is the best of a grid on other seeds than those of the table. At the end,
256 held-out prompts are answered once, for the reward and the KL to the initial policy. CPU seconds are those of one
thread, without these measurements. "Equal seconds" are those of the fastest arm. Means are interquartile means with
95 % percentile bootstrap intervals over seeds (Agarwal et al. 2021, arXiv 2108.13264).

A run is stored in --out when it has ended, and is not repeated by the next start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "against_trl")]
from common import SIZES, Hyperparameters, initial_model, make_prompts, reward  # noqa: E402
from rlchat_side import IdPPO, fit, make_batches, options_of, save_initial  # noqa: E402

from rlchat.data.batches import PreferenceBatch  # noqa: E402
from rlchat.models.networks import RLChatModel, response_log_ratios  # noqa: E402
from rlchat.models.sampling import Sampling, addressed_uniforms, generate  # noqa: E402
from rlchat.training.dpo import DPOModule  # noqa: E402
from rlchat.utils.bootstrap import bootstrap_interval  # noqa: E402
from rlchat.utils.files import write_atomically  # noqa: E402
from rlchat.utils.padding import pad  # noqa: E402

SIZE = SIZES["T"]
H = Hyperparameters(0.0, iterations=10)
HELD_OUT = 256  # prompts
DPO_STEPS = H.iterations * H.ppo_epochs * H.minibatches
DPO_BATCH = 2 * H.batch_size // H.minibatches  # responses of a step: as many pairs as PPO's minibatch has responses
SMOOTHED = 3  # iterations whose rewards are averaged for the reward at a time

RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)


@dataclass(frozen=True)
class Arm:
    """A method, and the settings that are tried for it."""

    name: str
    options: dict[str, Any]
    grid: tuple[dict[str, float], ...]


def _rates(**fixed: Sequence[float]) -> tuple[dict[str, float], ...]:
    names = ("learning_rate", *fixed)
    return tuple(dict(zip(names, values, strict=True)) for values in product(RATES, *fixed.values()))


ARMS = (
    Arm("PPO, separate critic", {"critic": "separate"}, _rates()),
    Arm("PPO, shared critic", {"critic": "shared"}, _rates()),
    Arm("RLOO", {"advantage": "rloo", "group_size": 4}, _rates()),
    Arm("GRPO", {"advantage": "grpo", "group_size": 4}, _rates()),
    Arm("REINFORCE++", {"advantage": "reinforce_pp"}, _rates()),
    Arm("DPO", {}, _rates(beta=(0.03, 0.1, 0.3))),
)


class Clock:
    """CPU seconds of this process since the start, without those while it was paused."""

    def __init__(self) -> None:
        self._began = time.process_time()
        self._paused = 0.0

    def seconds(self) -> float:
        return time.process_time() - self._began - self._paused

    def without(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``, whose time does not count."""
        began = time.process_time()
        try:
            return work()
        finally:
            self._paused += time.process_time() - began


class Curve(L.Callback):
    """Episodes, CPU seconds and reward of each iteration of PPO: of the responses that it samples."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # type: ignore[override]
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {"episodes": logged["train/episodes"], "reward": logged["train/reward"], "kl": logged["train/kl"]}
        self.rows.append({**row, "cpu_s": self.clock.seconds()})


def held_out(model: RLChatModel, initial: RLChatModel, seed: int, end_id: int, pad_id: int) -> dict[str, float]:
    """Mean reward of one response to each held-out prompt, and mean KL to the initial policy in nats."""
    prompts = make_prompts(SIZE, seed + 10_000, HELD_OUT)
    ids, mask = pad(prompts, SIZE.pad_id, "left")
    uniforms = addressed_uniforms(seed, 0, torch.arange(HELD_OUT))
    with torch.no_grad():
        sampled = generate(model, ids, mask, Sampling(SIZE.response), uniforms, end_id=end_id, pad_id=pad_id)
        kl = response_log_ratios(model, initial, (ids, mask), (sampled.ids, sampled.mask)).mean()
    rewards = [reward(row, SIZE) for row in sampled.ids.tolist()]
    return {"reward": statistics.mean(rewards), "kl": float(kl)}


def train_online(arm: Arm, setting: dict[str, float], seed: int, folder: Path) -> dict[str, Any]:
    """A run of PPO with one of the estimators."""
    group = arm.options.get("group_size", 1)
    prompts = make_prompts(SIZE, seed, H.iterations * H.batch_size // group)
    h = replace(H, learning_rate=setting["learning_rate"])
    given = options_of(h, SIZE, seed, "shared", initial_model(SIZE, seed), folder)
    module = IdPPO(**(given | arm.options))
    clock = Clock()
    curve = Curve(clock)
    fit(module, make_batches(prompts, SIZE, H.batch_size // group), curve)
    seconds = clock.seconds()
    ids = module.tokenizer.end_id, module.tokenizer.pad_id
    return {"curve": curve.rows, "cpu_s": seconds, **held_out(module.model, module.reference, seed, *ids)}


def pairs(model: RLChatModel, seed: int, end_id: int, pad_id: int) -> list[PreferenceBatch]:
    """The data of DPO in batches: two responses of the initial policy to each prompt, ranked by the true reward."""
    count = H.iterations * H.batch_size // 2
    prompts = [prompt for prompt in make_prompts(SIZE, seed, count) for _ in range(2)]
    batches = []
    for start in range(0, len(prompts), DPO_BATCH):
        part = prompts[start : start + DPO_BATCH]
        ids, mask = pad(part, SIZE.pad_id, "left")
        uniforms = addressed_uniforms(seed, 1, torch.arange(start, start + len(part)))
        with torch.no_grad():
            sampled = generate(model, ids, mask, Sampling(SIZE.response), uniforms, end_id=end_id, pad_id=pad_id)
        replies = sampled.ids.tolist()
        scores = torch.tensor([reward(reply, SIZE) for reply in replies]).view(-1, 2)
        # A tie is no preference: both responses get the same rank.
        rank = torch.stack([scores[:, 0] < scores[:, 1], scores[:, 1] < scores[:, 0]], 1).long().flatten()
        rows, attention = pad([a + b for a, b in zip(part, replies, strict=True)], SIZE.pad_id, "right")
        at = torch.arange(rows.shape[1])
        lengths = torch.tensor([len(prompt) for prompt in part])[:, None]
        response = (at >= lengths) & (at < lengths + SIZE.response)
        batches.append(PreferenceBatch(rows, attention, response, torch.arange(len(part)) // 2, rank))
    return batches


class DPOCurve(L.Callback):
    """The reward of held-out prompts against CPU seconds, at the start and twenty times in a run of DPO."""

    def __init__(self, clock: Clock, measure: Callable[[], dict[str, float]]) -> None:
        self.clock = clock
        self.measure = measure
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, *_: Any) -> None:
        self.measure_now()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step % max(1, DPO_STEPS // 20) == 0:
            self.measure_now()

    def measure_now(self) -> None:
        measured = self.clock.without(self.measure)
        self.rows.append({"episodes": H.iterations * H.batch_size, "cpu_s": self.clock.seconds(), **measured})


def train_dpo(setting: dict[str, float], seed: int, folder: Path) -> dict[str, Any]:
    """A run of DPO; its seconds include those of the responses."""
    save_initial(initial_model(SIZE, seed), SIZE, folder / "initial.pt")
    torch.manual_seed(seed)
    module = DPOModule(init_from=str(folder / "initial.pt"), schedule="linear", warmup=0.0, **setting)
    for model in (module.model, module.reference):
        model.unsayable[module.tokenizer.end_id] = True  # as in PPO
    ids = module.tokenizer.end_id, module.tokenizer.pad_id
    clock = Clock()
    batches = pairs(module.reference, seed, *ids)
    order = torch.Generator().manual_seed(seed)
    steps = [
        batches[i] for _ in range(-(-DPO_STEPS // len(batches))) for i in torch.randperm(len(batches), generator=order)
    ]
    curve = DPOCurve(clock, lambda: held_out(module.model, module.reference, seed, *ids))
    fit(module, steps[:DPO_STEPS], curve)  # type: ignore[arg-type]
    return {"curve": curve.rows, "cpu_s": clock.seconds(), **held_out(module.model, module.reference, seed, *ids)}


# ---- results ---------------------------------------------------------------------------------------------------------


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean without the lowest and the highest quarter of ``values`` [..., n]; the quarters are rounded down."""
    n = values.shape[-1]
    return np.asarray(np.sort(values)[..., n // 4 : n - n // 4].mean(-1))


def with_interval(values: Sequence[float], seed: int = 0) -> str:
    """The interquartile mean and its 95 % percentile bootstrap interval."""
    low, high = bootstrap_interval(interquartile_mean, np.asarray(values), seed=seed)
    return f"{interquartile_mean(np.asarray(values)):.3f} ({low:.3f} to {high:.3f})"


def reward_at(curve: Sequence[dict[str, float]], key: str, place: float) -> float:
    """The mean reward of the ``SMOOTHED`` rows of ``curve`` whose ``key`` is nearest to ``place``."""
    nearest = sorted(curve, key=lambda row: abs(row[key] - place))[:SMOOTHED]
    return statistics.mean(row["reward"] for row in nearest)


def table(runs: dict[str, list[dict[str, Any]]], settings: dict[str, dict[str, float]]) -> Iterator[str]:
    """The lines of the table in Markdown."""
    budget = min(statistics.median(run["cpu_s"] for run in found) for found in runs.values())
    yield f"| | settings | reward | KL | CPU s | reward after {budget:.1f} CPU s |"
    yield "|---|---|---|---|---|---|"
    for name, found in runs.items():
        setting = ", ".join(f"{key} {value:g}" for key, value in settings[name].items())
        columns = [with_interval([run[key] for run in found]) for key in ("reward", "kl")]
        seconds = f"{statistics.median(run['cpu_s'] for run in found):.1f}"
        early = with_interval([reward_at(run["curve"], "cpu_s", budget) for run in found])
        yield f"| {name} | {setting} | {' | '.join(columns)} | {seconds} | {early} |"
    if "DPO" in runs:
        for name, found in runs.items():
            if name != "DPO":
                gain = [
                    gain_at_equal_kl(one["curve"], dpo["curve"]) for one, dpo in zip(found, runs["DPO"], strict=True)
                ]
                yield f"\n{name} minus DPO at equal KL, same seed: {with_interval(gain)}"


def gain_at_equal_kl(curve: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> float:
    """The reward of ``curve`` minus that of ``other`` at the highest KL that both reach, linear between iterations."""
    curves = [sorted((row["kl"], row["reward"]) for row in rows) for rows in (curve, other)]
    kl = min(rows[-1][0] for rows in curves)
    one, two = (float(np.interp(kl, *np.transpose(rows))) for rows in curves)
    return one - two


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Reward against episodes, CPU seconds and KL: the mean over seeds, with a band between the quartiles."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for color, (name, found) in enumerate(runs.items()):
        rewards = np.array([[row["reward"] for row in run["curve"]] for run in found])
        for place, key in zip(axes, ("episodes", "cpu_s", "kl"), strict=True):
            x = np.array([[row[key] for row in run["curve"]] for run in found]).mean(0)
            if name == "DPO" and key == "episodes":
                place.plot(x[-1:], rewards.mean(0)[-1:], "o", color=f"C{color}", label=name)
                continue
            place.plot(x, rewards.mean(0), color=f"C{color}", label=name)
            if key != "kl":
                place.fill_between(x, *np.quantile(rewards, (0.25, 0.75), axis=0), color=f"C{color}", alpha=0.15, lw=0)
    for place, label in zip(
        axes, ("episodes", "CPU seconds of one thread", "KL to the initial policy, nats"), strict=True
    ):
        place.set_xlabel(label)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward")
    axes[0].legend(frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def run(arm: Arm, setting: dict[str, float], seed: int, out: Path) -> dict[str, Any]:
    """The stored result of a run, or that of a new one."""
    words = "-".join(f"{key}={value:g}" for key, value in setting.items())
    path = out / f"{arm.name.replace(', ', '-').replace(' ', '-')}-{words}-{seed}.json"
    if path.is_file():
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored
    with tempfile.TemporaryDirectory() as folder:
        train = train_dpo if arm.name == "DPO" else lambda *args: train_online(arm, *args)
        result = train(setting, seed, Path(folder))
    write_atomically(path, lambda file: file.write(json.dumps(result).encode()))
    print(f"{path.stem}: reward {result['reward']:.3f}, KL {result['kl']:.2f}, {result['cpu_s']:.1f} CPU s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds of the table: 0, 1, …")
    parser.add_argument("--tuning-seeds", type=int, default=3, help="seeds for the choice of settings: 100, 101, …")
    parser.add_argument("--out", type=Path, default=HERE / ".estimators", help="folder of the results")
    parser.add_argument("--plot", type=Path, help="draw the curves to this PNG file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options.out.mkdir(parents=True, exist_ok=True)
    settings, runs = {}, {}
    for arm in ARMS:
        tuned = range(100, 100 + options.tuning_seeds)
        means = [statistics.mean(run(arm, s, seed, options.out)["reward"] for seed in tuned) for s in arm.grid]
        settings[arm.name] = arm.grid[int(np.argmax(means))]
        runs[arm.name] = [run(arm, settings[arm.name], seed, options.out) for seed in range(options.seeds)]
    print("\n".join(table(runs, settings)))
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()
