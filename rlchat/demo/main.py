"""`rlchat demo`: the three stages in a row, on any machine, with no network.

Each stage is the `rlchat fit` command that it prints; what it leaves in `checkpoints/` the next one starts from.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlchat.conversation import Conversation
from rlchat.demo.corpus import TREES, write_demo_corpus
from rlchat.utils.files import set_aside, write_atomically
from rlchat.utils.threads import fastest_threads

DATA = Path("data/demo.jsonl")
REPORT = Path("checkpoints/report.json")
SHOWN = 8


def main(args: list[str]) -> int:
    """Runs the demo; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="rlchat demo", description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--seed", type=int, default=0, help="of the conversations, the split and the training")
    parser.add_argument("--trees", type=int, default=TREES, help="conversation trees to generate (default %(default)s)")
    parser.add_argument("--data-only", action="store_true", help=f"write {DATA} and stop")
    parser.add_argument("--threads", type=int, help="of each stage; by default 1, or more where that is faster now")
    parser.add_argument("--fast", action="store_true", help="a few batches of each stage, to see that all works")
    try:
        options = parser.parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    console = Console()
    write_conversations(options.trees, options.seed)
    console.print(f"[bold]{DATA}[/]: {options.trees:,} conversation trees, made with seed {options.seed}")
    if not options.data_only:
        Demo(console, options.seed, options.threads, options.fast).run()
    return 0


def write_conversations(trees: int, seed: int) -> None:
    """Makes ``data/demo.jsonl``; a different one that lies there is set aside, the same one is left alone."""
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
    """One run of the three stages, and what was measured on the way."""

    def __init__(self, console: Console, seed: int, threads: int | None, fast: bool) -> None:
        self.console = console
        self.seed = seed
        self.threads = threads
        self.common = [f"--seed_everything={seed}", f"--data.seed={seed}"] if seed else []
        self.fast = fast
        self.report: dict[str, Any] = {}

    def run(self) -> None:
        """SFT, reward model, PPO; then the tables and the report."""
        began = time.monotonic()
        self.fit("sft", "1 of 3: supervised fine-tuning, the model learns to speak as people did, good and bad alike")
        self.report["sft"] |= self.test("sft", "best").figures
        self.fit("reward", "2 of 3: reward model, it learns from people's ranks and labels what a good reply is")
        self.report["reward"] |= self.test("reward", "best").figures
        before = self.test("ppo", None)
        self.fit("ppo", "3 of 3: PPO, the model learns to say what people judge better")
        after = self.test("ppo", "best")
        self.report["ppo"] = {"before": before.figures, "after": {**after.figures, **self.report["ppo"]}}
        write_atomically(REPORT, lambda file: file.write((json.dumps(self.report, indent=1) + "\n").encode()))
        self.show(before, after, time.monotonic() - began)

    def fit(self, stage: str, what: str) -> None:
        """Trains one stage and notes how long it took."""
        title, _, gist = what.partition(", ")
        self.console.rule(f"[bold]Stage {title}", align="left")
        self.console.print(f"{gist[0].upper()}{gist[1:]}.")
        argv = ["fit", "--config", f"demo/{stage}", *self.seeded(stage)]
        self.announce(argv)
        if self.fast:
            argv += ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.max_epochs=1"]
            argv += ["--trainer.val_check_interval=1.0"]
        began = time.monotonic()
        threads = self.threads or fastest_threads()
        torch.set_num_threads(threads)
        _run(argv)
        self.report[stage] = {"seconds": round(time.monotonic() - began, 1), "threads": threads}

    def test(self, stage: str, checkpoint: str | None) -> Measured:
        """Measures a stage on the conversations that chose nothing; PPO with no checkpoint is the SFT model."""
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
            return Measured(figures, [], [])
        prompts = cli.datamodule.sample_prompts(SHOWN, "test")
        return Measured(figures, prompts, [reply.text for reply in cli.model.respond(prompts)])

    def seeded(self, stage: str) -> list[str]:
        """The options that make a run of another seed."""
        noise = [f"--model.seed={self.seed}"] if self.seed and stage == "ppo" else []
        return [*self.common, *noise]

    def announce(self, argv: list[str]) -> None:
        """Prints the command that is run."""
        self.console.print(f"[dim]$[/] rlchat {escape(' '.join(argv))}", highlight=False)

    def show(self, before: Measured, after: Measured, seconds: float) -> None:
        """What the reader wants to know: what it says now, how good that is, and what to type next."""
        self.console.rule("[bold]What the model says to prompts it has never seen, at temperature 1", align="left")
        table = Table(show_lines=False, pad_edge=False)
        for heading in ("prompt", "before PPO (SFT)", "after PPO"):
            table.add_column(heading, overflow="fold", ratio=1)
        for prompt, old, new in zip(before.prompts, before.replies, after.replies, strict=True):
            asked = " / ".join(message.text for message in prompt.messages if message.role == "user")
            table.add_row(escape(asked), _marked(prompt, old), _marked(prompt, new))
        self.console.print(table)

        self.console.rule("[bold]Held-out figures (test conversations, which chose nothing)", align="left")
        table = Table(pad_edge=False)
        for heading in ("", "before PPO", "after PPO"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, label in _FIGURES.items():
            if name in after.figures:
                table.add_row(label, f"{before.figures[name]:.3f}", f"{after.figures[name]:.3f}")
        self.console.print(table)
        reward = self.report["reward"]
        self.console.print(
            f"The reward model ranks {reward.get('pair_accuracy', 0):.0%} of held-out pairs as people did, and a right "
            f"reply over a wrong one in {reward.get('right_over_wrong', 0):.0%}. All took {seconds:.0f} s.\n"
        )
        stages = {"model": "rl_chat_model_tiktoken.pt", "plot": "rl_chat_model_tiktoken_stats.png"}
        for what, name in stages.items():
            self.console.print(f"{what:>8}  checkpoints/{name}", highlight=False)
        self.console.print(f"{'figures':>8}  {REPORT}", highlight=False)
        self.console.print(f"{'curves':>8}  tensorboard --logdir lightning_logs", highlight=False)
        self.console.print("\nTalk with it:  [bold]rlchat chat[/]", highlight=False)


class Measured:
    """Held-out figures of a model, and what it says to a few test prompts."""

    def __init__(self, figures: dict[str, float], prompts: list[Conversation], replies: list[str]) -> None:
        self.figures = figures
        self.prompts = prompts
        self.replies = replies


_FIGURES = {
    "answer_accuracy": "right answers, sampled at temperature 1",
    "answer_accuracy_greedy": "right answers, greedy",
    "reward": "reward",
    "kl": "KL to the SFT model, nats a reply",
    "distinct_2": "distinct-2 of the replies",
    "response_length": "tokens a reply",
    "truncated_fraction": "replies that ran out of tokens",
    "perplexity": "perplexity on human replies, good and bad",
}


def _marked(prompt: Conversation, reply: str) -> str:
    if prompt.check is None:
        return escape(reply)
    mark = "[green]✓[/]" if prompt.check.passes(reply) else "[red]✗[/]"
    return f"{mark} {escape(reply)}"


def _run(argv: list[str]) -> Any:
    from rlchat.cli import main as cli  # Lightning takes seconds to import; `rlchat demo --help` should not

    return cli.run(argv)


class _KeepLines(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written."""
