"""`rlchat demo --real`: PPO teaches a real chat model to reply in one short sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from rlchat.demo.real.base import find_base_model
from rlchat.demo.real.measure import Measured, mean_kl, measure, read_data
from rlchat.demo.real.tables import show_control, show_figures, show_replies
from rlchat.demo.tables import show_next_steps
from rlchat.look.report import write_page
from rlchat.models.model_file import PolicyBundle, load_policy
from rlchat.training.initial_model import open_policy
from rlchat.utils.devices import choose_device
from rlchat.utils.files import set_aside, write_atomically

CHECKPOINTS = Path("checkpoints")
MODEL = CHECKPOINTS / "rl_chat_model_tiktoken.pt"
REPORT = CHECKPOINTS / "real_report.json"
MAX_LENGTH = 256
SHOWN = 8

_FAST = ["--trainer.limit_train_batches=2", "--data.max_val_prompts=4", "--data.batch_size=2"]
_FAST_PROMPTS = 4


class RealDemo:
    """One run: the figures of the base model, PPO, and the same figures of the trained model.

    Args:
        console: where to print.
        seed: of the sampling and the training.
        threads: CPU threads; None: PyTorch's default.
        fast: train and measure on a few prompts only, as a quick test.

    Raises:
        UserError: if a package is missing.
    """

    def __init__(self, console: Console, seed: int, threads: int | None, fast: bool) -> None:
        self.console = console
        self.seed = seed
        self.fast = fast
        self.run_folder = Path()  # of the last stage
        self.base_model = find_base_model()
        self.device = choose_device(None)
        if threads is not None:
            torch.set_num_threads(threads)
        some = slice(_FAST_PROMPTS if fast else None)
        self.held_out = read_data("held_out.jsonl")[some]
        self.control = read_data("control.jsonl")[some]

    def run(self) -> None:
        """Measures, trains, measures again; then the report and the tables."""
        disable_progress_bar()  # of loading weights
        began = time.monotonic()
        self.title("1 of 3: the base model", f"It replies to {len(self.held_out)} prompts that training does not use.")
        before = self.measure(self.base())
        self.title("2 of 3: PPO", "The reward is high for one short, complete sentence, and for correct answers.")
        trained, training = self.fit("real", ["train.jsonl", "facts.jsonl"], [self.base_option], fast=_FAST)
        training["iterations"] = int(trained.model.iterations)
        self.title("3 of 3: the trained model", "It replies to the same prompts.")
        tuned = load_policy(MODEL, self.device)
        after = self.measure(tuned)
        kl = mean_kl(tuned, self.base(), after.sampled)
        reward = trained.model.reward
        report: dict[str, Any] = {
            "seed": self.seed,
            "seconds": round(time.monotonic() - began, 1),
            "threads": torch.get_num_threads(),
            "training": training,
            "before": before.figures(reward),
            "after": {**after.figures(reward), "kl": round(kl, 3)},
            "control": before.control_beside(after),
            "replies": before.replies_beside(after),
        }
        write_report(REPORT, report)
        show_replies(self.console, report["replies"], SHOWN)
        show_control(self.console, report["control"])
        show_figures(self.console, report)
        commands = {
            "tensorboard --logdir lightning_logs": "training curves",
            "rlchat demo --real --seed 1": "the same with another seed",
        }
        self.show_next_steps(REPORT, commands)

    def base(self) -> PolicyBundle:
        """The base model, in eval mode."""
        bundle = open_policy(str(self.base_model), None, MAX_LENGTH, None, None)
        bundle.model.to(self.device).eval()
        return bundle

    def measure(self, bundle: PolicyBundle) -> Measured:
        """The replies and figures of one model."""
        return measure(bundle, self.held_out, self.control, seed=self.seed)

    @property
    def base_option(self) -> str:
        """The option of `rlchat fit` for a stage that starts from the base model."""
        return f"--model.base_model={self.base_model}"

    def fit(
        self,
        recipe: str,
        names: Sequence[str],
        options: Sequence[str] = (),
        *,
        fast: Sequence[str],
        seeds: Sequence[str] = ("seed_everything", "data.seed", "model.seed"),
    ) -> tuple[Any, dict[str, Any]]:
        """Trains with the recipe ``demo/<recipe>`` on the packaged files ``names``.

        ``fast`` are the options of a quick test, and ``seeds`` the options that are set to a seed other than 0.
        Returns the CLI with the trained module, and the seconds.
        """
        from rlchat.cli import main as cli  # importing Lightning takes seconds

        with as_file(files("rlchat.demo.real") / "data") as data:
            argv = ["fit", "--config", f"demo/{recipe}", *options, "--data.path", *(str(data / name) for name in names)]
            argv += [f"--{name}={self.seed}" for name in seeds] if self.seed else []
            self.console.print(f"[dim]$[/] rlchat {escape(' '.join(argv))}", highlight=False, soft_wrap=True)
            began = time.monotonic()
            trained = cli.run([*argv, *(fast if self.fast else [])])
        self.run_folder = Path(trained.trainer.log_dir or "")
        return trained, {"seconds": round(time.monotonic() - began, 1)}

    def show_next_steps(self, report: Path, commands: dict[str, str]) -> None:
        """Writes the page about the last stage beside ``report``; prints the files and the ``commands`` to go on."""
        page, _ = write_page(self.run_folder, report.with_suffix(".html"), keep_older=True)
        show_next_steps(self.console, report, page, commands, '"How do bees find flowers?" or "Why is the sky blue?"')

    def title(self, stage: str, purpose: str) -> None:
        """Prints the heading of a stage."""
        self.console.rule(f"[bold]Stage {stage}", align="left")
        self.console.print(purpose)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes ``report`` as JSON; an older report is renamed."""
    if path.exists():
        set_aside(path)
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(content.encode()))
