"""`rlchat demo`: trains a chat model in three stages on generated conversations. It needs no network and no GPU.

The stages are supervised fine-tuning (SFT), a reward model, and PPO. Each one is an `rlchat fit` command, which the
demo prints. Models, plots and figures are written to checkpoints/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from rlchat.conversation import Conversation
from rlchat.demo.corpus import TREES, write_demo_corpus
from rlchat.demo.tables import show_figures, show_first_messages, show_next_steps, show_replies
from rlchat.errors import UserError
from rlchat.look.report import write_page
from rlchat.utils.files import set_aside, write_atomically
from rlchat.utils.threads import fastest_threads

DATA = Path("data/demo.jsonl")
CHECKPOINTS = Path("checkpoints")
REPORT = CHECKPOINTS / "report.json"
SHOWN = 8

_STAGES = {
    "sft": ("1 of 3: supervised fine-tuning", "The model learns to imitate people's replies, good and bad."),
    "reward": ("2 of 3: reward model", "It learns from people's ranks and labels which responses are good."),
    "ppo": ("3 of 3: PPO", "The chat model learns to give replies that the reward model scores higher."),
}
_FAST = [
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.max_epochs=1",
    "--trainer.val_check_interval=1.0",
]
_FAST_PPO = ["--model.critic_warmup=0", "--model.schedule=constant"]


def main(args: list[str]) -> int:
    """Runs the demo; returns the exit code. Raises UserError."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    console = Console()
    if options.rankings and not options.real:
        raise UserError("--rankings applies only to a real chat model; add --real")
    if options.real:
        if options.data_only or options.trees is not None:
            raise UserError("--data-only and --trees apply only to generated conversations; omit them with --real")
        # importing the models takes seconds
        from rlchat.demo.real.main import RealDemo
        from rlchat.demo.real.rankings import RankingsDemo

        demo = RankingsDemo if options.rankings else RealDemo
        demo(console, options.seed, options.threads, options.fast).run()
        return 0
    trees = options.trees or TREES
    write_conversations(trees, options.seed)
    console.print(f"[bold]{DATA}[/]: {trees:,} conversation trees, made with seed {options.seed}")
    if not options.data_only:
        Demo(console, options.seed, options.threads, options.fast).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlchat demo", description=__doc__, formatter_class=_KeepLines)
    parser.add_argument(
        "--seed",
        type=_integer("--seed", at_least=0),
        default=0,
        metavar="N",
        help="seed of the conversations, the data split and the training (default 0)",
    )
    parser.add_argument(
        "--trees",
        type=_integer("--trees", at_least=1),
        metavar="N",
        help=f"number of conversation trees to generate (default {TREES:,})",
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="instead, teach a real chat model, SmolLM2-135M-Instruct, to reply in one short sentence",
    )
    parser.add_argument(
        "--rankings",
        action="store_true",
        help="with --real: run all three stages with people's rankings of replies (77 minutes of CPU time)",
    )
    parser.add_argument("--data-only", action="store_true", help=f"only write {DATA}, without training")
    parser.add_argument(
        "--threads",
        type=_integer("--threads", at_least=1),
        metavar="N",
        help="CPU threads of each stage (default: 1, or more if a quick test finds that faster; --real: all cores)",
    )
    parser.add_argument("--fast", action="store_true", help="train each stage on a few batches only, as a quick test")
    return parser


def _integer(option: str, *, at_least: int) -> Callable[[str], int]:
    """A reader of integers for ``option``, which raises UserError for any other text."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UserError(f"invalid value {text!r} for {option}: expected an integer") from None
        if value < at_least:
            raise UserError(f"invalid value {text!r} for {option}: expected an integer of at least {at_least}")
        return value

    return read


def write_conversations(trees: int, seed: int) -> None:
    """Writes ``data/demo.jsonl``. An existing file with other contents is renamed; the same contents are left alone."""
    fresh = DATA.with_name(".demo.fresh.jsonl")
    try:
        write_demo_corpus(fresh, trees=trees, seed=seed)
        if DATA.exists():
            if DATA.read_bytes() == fresh.read_bytes():
                return
            set_aside(DATA)
        fresh.replace(DATA)
    finally:
        fresh.unlink(missing_ok=True)


class Demo:
    """One run of the three stages, with the figures measured on the way."""

    def __init__(self, console: Console, seed: int, threads: int | None, fast: bool) -> None:
        self.console = console
        self.seed = seed
        self.threads = threads
        self.common = [f"--seed_everything={seed}", f"--data.seed={seed}"] if seed else []
        self.fast = fast
        self.report: dict[str, Any] = {}
        self.run_folder = Path()  # of the last stage

    def run(self) -> None:
        """SFT, reward model and PPO; then the report and the tables."""
        from rlchat.demo.measure import chat_with  # importing the models takes seconds too

        began = time.monotonic()
        self.fit("sft")
        self.report["sft"] |= self.test("sft", "best")[0]
        self.fit("reward")
        self.report["reward"] |= self.test("reward", "best")[0]
        before, prompts = self.test("ppo", None)
        self.fit("ppo")
        after, _ = self.test("ppo", "best")
        old = chat_with(CHECKPOINTS / "sft_model.pt", prompts, seed=self.seed, shown=SHOWN)
        new = chat_with(CHECKPOINTS / "rl_chat_model_tiktoken.pt", prompts, seed=self.seed, shown=SHOWN)
        trained = self.report["ppo"]
        self.report["ppo"] = {"before": before | old.figures, "after": {**after, **new.figures, **trained}}
        self.report["first_messages"] = new.first_messages
        write_atomically(REPORT, lambda file: file.write((json.dumps(self.report, indent=1) + "\n").encode()))
        show_replies(self.console, prompts[:SHOWN], old.replies, new.replies)
        show_first_messages(self.console, new.first_messages, SHOWN)
        show_figures(self.console, self.report, time.monotonic() - began)
        commands = {
            "rlchat look": "the responses of PPO, token by token",
            "tensorboard --logdir lightning_logs": "training curves of all three stages",
            "rlchat demo --seed 1": "train in another world",
        }
        questions = '"Hello, how are you?", "What is the capital of Belan?" or "3 + 4"'
        page, _ = write_page(self.run_folder, REPORT.with_suffix(".html"), keep_older=True)
        show_next_steps(self.console, REPORT, page, commands, questions)

    def fit(self, stage: str) -> None:
        """Trains one stage, and records how long it took."""
        title, purpose = _STAGES[stage]
        self.console.rule(f"[bold]Stage {title}", align="left")
        self.console.print(purpose)
        argv = ["fit", "--config", f"demo/{stage}", *self.seeded(stage)]
        self.announce(argv)
        began = time.monotonic()
        threads = self.threads or fastest_threads()
        torch.set_num_threads(threads)
        cli = _run([*argv, *(_FAST if self.fast else []), *(_FAST_PPO if self.fast and stage == "ppo" else [])])
        self.run_folder = Path(cli.trainer.log_dir)
        self.report[stage] = {"seconds": round(time.monotonic() - began, 1), "threads": threads}

    def test(self, stage: str, checkpoint: str | None) -> tuple[dict[str, float], list[Conversation]]:
        """The figures of a stage on the held-out test split, and the prompts in it.

        PPO without a checkpoint is the SFT model.
        """
        argv = ["test", "--config", f"demo/{stage}", *self.seeded(stage)]
        argv += [f"--ckpt_path={checkpoint}"] if checkpoint else []
        self.announce(argv)
        if self.fast:
            argv += ["--trainer.limit_test_batches=2"]
        cli = _run([*argv, "--verbose=false"])
        figures = {
            name.removeprefix("test/"): round(float(value), 4)
            for name, value in cli.trainer.callback_metrics.items()
            if name.startswith("test/")
        }
        if stage != "ppo":
            return figures, []
        # the prompts of the table first, which are spread evenly; then all others
        shown = cli.datamodule.sample_prompts(SHOWN, "test")
        every = cli.datamodule.sample_prompts(16 if self.fast else 1_000_000, "test")
        return figures, [*shown, *(prompt for prompt in every if prompt not in shown)]

    def seeded(self, stage: str) -> list[str]:
        """The options that set the seed of a stage; none for seed 0."""
        noise = [f"--model.seed={self.seed}"] if self.seed and stage == "ppo" else []
        return [*self.common, *noise]

    def announce(self, argv: list[str]) -> None:
        """Prints the command that is run."""
        self.console.print(f"[dim]$[/] rlchat {escape(' '.join(argv))}", highlight=False)


def _run(argv: list[str]) -> Any:
    from rlchat.cli import main as cli  # importing Lightning takes seconds, which `rlchat demo --help` should not

    return cli.run(argv)


class _KeepLines(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring with its line breaks."""
