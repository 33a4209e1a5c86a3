"""DPO beside a reward model and PPO on the same preference pairs: gold accuracy at equal KL in the demo's world.

    python -m benchmarks.preferences --plot preferences.png      (five seeds)
    python -m benchmarks.preferences --seeds 0 --out FOLDER

The world is that of `rlchat demo`, in which the right answer to every question is known. One SFT model imitates
people's replies in 4,400 conversation trees, with the demo's recipe and half of its width. From this model, each seed
trains on the ranks of the same replies, without their labels:

- DPO, with each β of DPO_BETAS
- a reward model, and PPO against it with each kl_coef of KL_COEFS

The seed draws the order of the data, the 5 % of it that only validate the reward model, and the noise of sampling. The
SFT model and the measured prompts are the same for all seeds, so intervals do not show how a result depends on them.

Ten times in a run, the prompts of 400 other trees of this world are answered: at temperature 1, which also gives the KL
to the SFT model, and greedily. An answer is right if it contains the true answer and no other one. Accuracy at a KL is
linear between the measurements of a run, where the run first reaches it.

A run is stored in --out when it has ended, and is not repeated by the next start.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "against_trl")]
from compare import estimate  # noqa: E402

from rlchat.conversation import Conversation  # noqa: E402
from rlchat.data.datamodule import OASST2DataModule  # noqa: E402
from rlchat.data.formats import read_trees  # noqa: E402
from rlchat.demo.corpus import demo_trees  # noqa: E402
from rlchat.models.networks import response_log_ratios  # noqa: E402
from rlchat.models.sampling import Sampling, addressed_uniforms  # noqa: E402
from rlchat.ppo.module import PPOModule  # noqa: E402
from rlchat.rewards import LearnedQuality, Reward  # noqa: E402
from rlchat.rewards.ending import MissingEnd  # noqa: E402
from rlchat.training.base import StageModule  # noqa: E402
from rlchat.training.dpo import DPOModule  # noqa: E402
from rlchat.training.reward_model import RewardModelModule  # noqa: E402
from rlchat.training.sft import SFTModule  # noqa: E402
from rlchat.utils.files import write_atomically  # noqa: E402
from rlchat.utils.padding import pad  # noqa: E402

RECIPES = HERE.parent / "configs" / "demo"
WORLD = 0  # the seed of the conversations
TREES, HELD_OUT_TREES = 4400, 400  # together those of the demo
WIDTH = {"hidden_size": 64, "intermediate_size": 172}
MAX_NEW_TOKENS = 24
SFT_EPOCHS, REWARD_EPOCHS, DPO_EPOCHS = 5, 4, 1
PPO_ITERATIONS, PPO_BATCH = 40, 128
DPO_RATE, PPO_RATE = 3e-4, 3e-4
DPO_BETAS = (0.1, 0.3)
KL_COEFS = (0.03, 0.1)
MEASUREMENTS = 10  # of a run, beside that of its start
KLS = (0.25, 0.5, 0.75, 1.0, 1.5)  # nats per response

Row = dict[str, float]


def recipe(stage: str) -> dict[str, Any]:
    """The options of the demo's module for a stage."""
    options: dict[str, Any] = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())["model"]["init_args"]
    return options


def settings_now() -> dict[str, Any]:
    """Everything that a result depends on, apart from its name and the code."""
    kinds = (int, float, tuple, dict)
    own = {name: x for name, x in globals().items() if name.isupper() and name != "KLS" and isinstance(x, kinds)}
    return own | {stage: recipe(stage) for stage in ("sft", "reward", "ppo")}


class Recorder(L.Callback):
    """KL to the reference model and gold accuracy of a policy: at the start, and after every ``every`` batches.

    Attributes:
        rows: one per measurement: ``step``, ``kl`` in nats per response, ``sampled`` and ``greedy`` accuracy, and
            ``tokens`` per sampled response.
    """

    def __init__(self, prompts: Sequence[Conversation], every: int) -> None:
        self.prompts, self.every = prompts, every
        self.rows: list[Row] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The SFT model."""
        self.measure(pl_module, 0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """The policy after some batches."""
        batches = trainer.fit_loop.total_batch_idx + 1
        if batches % self.every == 0:
            self.measure(pl_module, batches)

    @torch.no_grad()
    def measure(self, module: Any, step: int) -> None:
        """Adds a row. Every measurement uses the same random numbers, so that differences come from the policy."""
        ids, mask = pad([module.tokenizer.render_prompt(p).ids for p in self.prompts], module.tokenizer.pad_id, "left")
        uniforms = addressed_uniforms(0, 0, torch.arange(len(ids)))
        made = {t: module.generate(ids, mask, Sampling(MAX_NEW_TOKENS, temperature=t), uniforms) for t in (0.0, 1.0)}
        sampled = made[1.0]
        modes = [network.training for network in (module.model, module.reference)]
        module.model.eval(), module.reference.eval()
        kl = response_log_ratios(module.model, module.reference, (ids, mask), (sampled.ids, sampled.mask)).mean()
        for network, mode in zip((module.model, module.reference), modes, strict=True):
            network.train(mode)
        greedy, right = (self.accuracy(module, made[t]) for t in (0.0, 1.0))
        tokens = float(sampled.mask.sum(1).float().mean())
        self.rows.append({"step": step, "kl": float(kl), "sampled": right, "greedy": greedy, "tokens": tokens})

    def accuracy(self, module: Any, generated: Any) -> float:
        """The share of right answers."""
        replies = module.decode(generated)
        passed = [prompt.passes(reply.text) is True for prompt, reply in zip(self.prompts, replies, strict=True)]
        return sum(passed) / len(passed)


def fit(
    module: StageModule, data: OASST2DataModule, epochs: int, *callbacks: L.Callback, **more: Any
) -> dict[str, float]:
    """Trains without writing files; ``more`` are options of the Trainer. Returns the last metrics."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0 if module.automatic_optimization else None,
        **more,
    )
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class Study:
    """The trainings in one folder; a result that is there is not computed again."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.sft = out / "sft_model.pt"

    def prepare(self) -> None:
        """Writes the conversations and the SFT model."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings, about = self.out / "settings.json", json.dumps(settings_now(), indent=1) + "\n"
        if settings.is_file() and settings.read_text() != about:
            sys.exit(f"{self.out} has results with other settings; set another --out")
        write_atomically(settings, lambda file: file.write(about.encode()))
        trees = demo_trees(TREES + HELD_OUT_TREES, WORLD)
        for name, count in (("train", TREES), ("held_out", HELD_OUT_TREES)):
            rows = [json.dumps(tree, ensure_ascii=False).encode() + b"\n" for tree in islice(trees, count)]
            write_atomically(self.out / f"{name}.jsonl", lambda file, rows=rows: file.writelines(rows))
        held_out = read_trees([self.out / "held_out.jsonl"])[0]
        self.prompts = [prompt for tree in held_out for prompt in tree.prompts if prompt.is_prompt and prompt.check]
        if not self.sft.is_file():
            L.seed_everything(WORLD, verbose=False)
            options = recipe("sft")
            module = SFTModule(**options | {"base_model": options["base_model"] | WIDTH})
            fit(module, self.data(0, 32, min_quality=None, best_rank_only=False), SFT_EPOCHS)
            module.save_bundle(self.sft)

    def data(self, seed: int, batch_size: int, **more: Any) -> OASST2DataModule:
        """The training trees in an order drawn by ``seed``, with a validation split of 5 %."""
        return OASST2DataModule(
            str(self.out / "train.jsonl"),
            batch_size=batch_size,
            val_batch_size=128,
            test_fraction=0.0,
            seed=seed,
            cache_dir=str(self.out / "cache"),
            **more,
        )

    def result(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored result ``name``, or that of ``work``."""
        path = self.out / f"{name}.json"
        if path.is_file():
            stored: dict[str, Any] = json.loads(path.read_text())
            return stored
        began = time.process_time()
        made = {**work(), "cpu_s": time.process_time() - began}
        write_atomically(path, lambda file: file.write(json.dumps(made).encode()))
        print(f"{name}: {made['cpu_s']:.0f} CPU s", flush=True)
        return made

    def reward_model(self, seed: int) -> dict[str, Any]:
        """Trains the reward model of a seed on ranks alone, and writes it."""
        L.seed_everything(seed, verbose=False)
        module = RewardModelModule(**recipe("reward") | {"init_from": str(self.sft), "label_coef": 0.0})
        metrics = fit(module, self.data(seed, 12), REWARD_EPOCHS)
        module.save_bundle(self.out / f"reward-{seed}.pt")
        return {name: metrics[f"val/{name}"] for name in ("pair_accuracy", "right_over_wrong")}

    def dpo(self, seed: int, beta: float) -> dict[str, Any]:
        """A run of DPO; its validation takes no part."""
        L.seed_everything(seed, verbose=False)
        module = DPOModule(init_from=str(self.sft), beta=beta, learning_rate=DPO_RATE, warmup=0.03, seed=seed)
        data = self.data(seed, 12)
        data.needs = module.data_needs
        data.setup()
        recorder = Recorder(self.prompts, len(data.train_dataloader()) * DPO_EPOCHS // MEASUREMENTS)
        fit(module, data, DPO_EPOCHS, recorder, limit_val_batches=0)
        return {"curve": recorder.rows}

    def ppo(self, seed: int, kl_coef: float) -> dict[str, Any]:
        """A run of PPO against the reward model of the seed."""
        L.seed_everything(seed, verbose=False)
        reward = Reward([LearnedQuality(str(self.out / f"reward-{seed}.pt")), MissingEnd(weight=1.0)])
        options = {"init_from": str(self.sft), "reward": reward, "kl_coef": kl_coef, "learning_rate": PPO_RATE}
        module = PPOModule(**recipe("ppo") | options | {"max_new_tokens": MAX_NEW_TOKENS, "seed": seed})
        data = self.data(seed, PPO_BATCH, min_quality=None, best_rank_only=False)
        recorder = Recorder(self.prompts, PPO_ITERATIONS // MEASUREMENTS)
        passes = 2  # the training trees have prompts for half of the iterations
        fit(module, data, passes, recorder, limit_val_batches=0, limit_train_batches=PPO_ITERATIONS // passes)
        return {"curve": recorder.rows}

    def runs(self, seed: int) -> dict[str, dict[str, Any]]:
        """All runs of a seed by name."""
        reward = self.result(f"reward-{seed}", lambda: self.reward_model(seed))
        found = {"reward model": reward}
        for beta in DPO_BETAS:
            found[f"DPO, β {beta:g}"] = self.result(f"dpo-{beta:g}-{seed}", lambda beta=beta: self.dpo(seed, beta))
        for coef in KL_COEFS:
            found[f"PPO, `kl_coef` {coef:g}"] = self.result(
                f"ppo-{coef:g}-{seed}", lambda coef=coef: self.ppo(seed, coef)
            )
        return found


# ---- results ---------------------------------------------------------------------------------------------------------


def at_kl(curve: Sequence[Row], kl: float, metric: str) -> float:
    """``metric`` where ``curve`` first reaches ``kl``, linear between measurements; NaN if it does not reach it."""
    for before, after in pairwise(curve):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"]) if after["kl"] > before["kl"] else 1.0
            return before[metric] + share * (after[metric] - before[metric])
    return float("nan")


def shown(values: Sequence[float], digits: int = 1, scale: float = 100) -> str:
    """The mean times ``scale`` (shares: in percent), with half of its 95 % t interval; of how many, if not of all."""
    known = [scale * value for value in values if not np.isnan(value)]
    if len(known) < 2:
        return f"{known[0]:.{digits}f} (1 run)" if known else "not reached"
    mean, half = estimate(known)
    missing = "" if len(known) == len(values) else f" ({len(known)} runs)"
    return f"{mean:.{digits}f} ± {half:.{digits}f}{missing}"


def table(runs: dict[str, list[dict[str, Any]]], metric: str) -> Iterator[str]:
    """The lines of a table in Markdown: accuracy at each KL and at the end, and the differences from the first arm."""
    yield f"| {metric} | {' | '.join(f'KL {kl:g}' for kl in KLS)} | at the end | KL at the end |"
    yield "|---|" + "---|" * (len(KLS) + 2)
    columns = {name: [[at_kl(run["curve"], kl, metric) for run in found] for kl in KLS] for name, found in runs.items()}
    for name, found in runs.items():
        ends = shown([run["curve"][-1][metric] for run in found])
        kls = shown([run["curve"][-1]["kl"] for run in found], digits=2, scale=1)
        yield f"| {name} | {' | '.join(map(shown, columns[name]))} | {ends} | {kls} |"
    for one, other in ((a, b) for a in runs for b in runs if a.startswith("PPO") and b.startswith("DPO")):
        gains = [
            shown([x - y for x, y in zip(first, second, strict=True)])
            for first, second in zip(columns[one], columns[other], strict=True)
        ]
        yield f"| {one} minus {other} | {' | '.join(gains)} | | |"


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy of sampled and of greedy answers against KL: every run, and the mean of the seeds at each KL."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (name, found) in enumerate(runs.items()):
        for place, metric in zip(axes, ("sampled", "greedy"), strict=True):
            for run in found:
                place.plot(*_columns(run["curve"], metric), color=f"C{number}", alpha=0.25, lw=1)
            reached = min(max(row["kl"] for row in run["curve"]) for run in found)
            kls = np.linspace(0.0, reached, 40)
            means = [np.mean([at_kl([*run["curve"]], kl, metric) for run in found]) for kl in kls]
            place.plot(kls, means, color=f"C{number}", lw=2, label=name.replace("`", ""))
    for place, title in zip(axes, ("sampled answers, temperature 1", "greedy answers"), strict=True):
        place.set_title(title, fontsize=10)
        place.set_xlabel("KL to the SFT model, nats per response")
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right answers to held-out prompts")
    axes[1].legend(frameon=False, fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _columns(curve: Sequence[Row], metric: str) -> tuple[list[float], list[float]]:
    return [row["kl"] for row in curve], [row[metric] for row in curve]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="by default %(default)s")
    parser.add_argument("--out", type=Path, default=HERE / ".preferences", help="folder of the results")
    parser.add_argument("--plot", type=Path, help="draw the curves to this PNG file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    study = Study(options.out)
    study.prepare()
    found = [study.runs(seed) for seed in options.seeds]
    runs = {name: [of_seed[name] for of_seed in found] for name in found[0]}
    rewards = runs.pop("reward model")
    ranked = shown([reward["pair_accuracy"] for reward in rewards])
    print(f"{len(study.prompts)} prompts; the reward models rank {ranked} % of held-out pairs as people do")
    for metric in ("sampled", "greedy"):
        print("\n" + "\n".join(table(runs, metric)))
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    for name in ("lightning.pytorch", "lightning.fabric", "rlchat"):  # their messages do not concern a study
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    main()
