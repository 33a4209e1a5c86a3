"""Learning while chatting, with simulated users whose truth is known.

    rlchat demo
    python -m benchmarks.learn_while_chatting --plot learn_while_chatting.png

A user of the demo's world asks the demo's model questions, and judges sampled responses. It has one hidden preference:
other facts, politeness or shortness. Half of its questions are of the kinds of talk that the preference is about, the
taught kinds. It corrects bad responses, or gives 👎, and gives 👍 to good ones. A share of its verdicts may be wrong:
those of somebody who wants the opposite. `rlchat learn` makes a version of the model from them, with its default
options.

Gold accuracy is the share of responses that are as the user wants, on questions that it never asked, at temperature 0:
200 of the taught kinds, and 600 of the other kinds. A version that the gate rejects is measured too ("no gate"). The
table has changes in points, as means with 95 % t intervals over seeds.

In the runs of the second table, the learner runs after every 25 verdicts, and a version that the gate accepts answers
from then on. The verdicts that follow are on its responses.

A run is stored in --out when it has ended, and is not repeated by the next start.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.learn_while_chatting.pieces import SEEDS, all_pieces, run
from benchmarks.learn_while_chatting.report import chained_table, draw, table
from rlchat.cli.messages import configure_messages
from rlchat.utils.files import write_atomically
from rlchat.utils.progress import DelayedProgress


def main() -> None:
    """Runs what has not been run, and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learn_while_chatting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=Path("checkpoints/rl_chat_model_tiktoken.pt"))
    parser.add_argument("--data", default="data/demo.jsonl", help="the demo's conversations, which are replayed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("learn_while_chatting"), help="the folder of the runs")
    parser.add_argument("--only", nargs="+", help="run only what has one of these texts in its name")
    parser.add_argument("--minutes", type=float, help="start no further run after this time")
    parser.add_argument("--plot", type=Path, help="write a figure to this file")
    options = parser.parse_args()
    configure_messages("learn")
    torch.set_num_threads(1)
    began = time.monotonic()
    pieces = [p for p in all_pieces(options.seeds) if not options.only or any(x in p.name for x in options.only)]
    figures = []
    with DelayedProgress("learning", len(pieces), show=True) as bar:
        for done, piece in enumerate(pieces):
            known = (options.out / f"{piece.name}.json").is_file()
            if known or options.minutes is None or time.monotonic() - began < 60 * options.minutes:
                figures.append(run(piece, options.model, options.data, options.out))
            bar.update(done + 1)
    print(f"{table(figures)}\n\n{chained_table(figures)}")
    seconds = sum(one["cpu_seconds"] for one in figures)
    print(f"\n{len(figures)} of {len(pieces)} runs, {seconds / 60:.0f} CPU minutes", file=sys.stderr)
    if options.plot is not None:
        drawing = draw(figures)
        kind = options.plot.suffix[1:]
        write_atomically(options.plot, lambda file: drawing.savefig(file, format=kind, dpi=120))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
