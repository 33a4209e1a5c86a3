"""Time and memory of reading data: the first start, which tokenizes, and the second, from the cache.

    python benchmarks/data.py --rows 10000 100000 1000000 --task sft ppo reward
    python benchmarks/data.py --oasst 130000 --task sft ppo reward

With --rows, a file has rows of messages with a quality, and every fourth row is a text. With --oasst, it has about that
many messages in OASST's trees, with its fields, ranks and labels, half of them in another language. All text is random
words. Each start is a new process that makes the first training batch. A row of the output has its seconds and CPU
seconds without and with the imports, and the peak of resident memory in MB: of this process after the imports and at
the end, and of the largest worker. The resident memory includes pages of mapped files. With --plot, seconds and
memory are drawn over the number of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASKS = ("sft", "reward", "ppo")
LANGUAGES = ("en", "es")
TREE_STATES = ("ready_for_export", "ready_for_export", "ready_for_export", "prompt_lottery_waiting")


class Words:
    """Random texts of words that the packaged encoding knows in part."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgk"
        self.words = ["".join(self.random.choices(letters, k=self.random.randint(2, 9))) for _ in range(20_000)]

    def text(self, fewest: int, most: int) -> str:
        return " ".join(self.random.choices(self.words, k=self.random.randint(fewest, most))) + "."


def simple_rows(count: int) -> Iterator[dict[str, Any]]:
    """``count`` rows, about 200 bytes each: three of four are a question with a response, the fourth is a text."""
    words = Words(0)
    for i in range(count):
        quality = words.random.randint(0, 4) / 4
        if i % 4 == 3:
            yield {"text": words.text(8, 30), "quality": quality}
        else:
            question, response = words.text(4, 12), words.text(5, 25)
            yield {"messages": [{"content": f"{i} {question}"}, {"content": response}], "quality": quality}


def oasst_rows(count: int) -> Iterator[dict[str, Any]]:
    """OASST trees with ``count`` messages or a few more: five levels, and up to three ranked responses."""
    words, made = Words(1), 0
    while made < count:
        number = made

        def message(role: str, parent: str | None, rank: int | None, level: int, lang: str) -> dict[str, Any]:
            nonlocal made
            made += 1
            known = words.random
            label = {"value": known.random(), "count": 3}
            names = ("spam", "fails_task", "lang_mismatch", "not_appropriate", "quality", "toxicity", "humor")
            row = {
                "message_id": f"{made:08x}-0000-4000-8000-000000000000",
                "parent_id": parent,
                "user_id": f"{known.randrange(10**6):08x}-1111-4000-8000-000000000000",
                "created_date": "2023-02-05T14:23:50.983374+00:00",
                "text": words.text(5, 40) if role == "prompter" else words.text(20, 200),
                "role": role,
                "lang": lang,
                "review_count": 3,
                "review_result": True,
                "deleted": known.random() < 0.02,
                "rank": rank,
                "synthetic": False,
                "model_name": None,
                "detoxify": {"toxicity": known.random(), "severe_toxicity": known.random(), "insult": known.random()},
                "emojis": {"+1": {"count": 2}},
                "labels": dict.fromkeys(names, label),
                "replies": [],
            }
            if level < 4:
                responses = 1 if role == "assistant" else known.randint(1, 3)
                role = "prompter" if role == "assistant" else "assistant"
                row["replies"] = [
                    message(role, row["message_id"], i if role == "assistant" else None, level + 1, lang)
                    for i in range(responses if level == 0 or known.random() < 0.7 else 0)
                ]
            return row

        lang, state = words.random.choice(LANGUAGES), words.random.choice(TREE_STATES)
        prompt = message("prompter", None, None, 0, lang)
        yield {"message_tree_id": f"tree-{number}", "tree_state": state, "prompt": prompt}


def start(path: str, task: Any, cache: str, encoding: str, workers: int) -> dict[str, Any]:
    """What ``rlchat fit`` does with the data until the first training batch; run in a process of its own."""
    from rlchat.data.datamodule import DataNeeds, OASST2DataModule
    from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

    data = OASST2DataModule(path, batch_size=8, cache_dir=cache, num_workers=workers)
    data.needs = DataNeeds(task, ChatTokenizer(encoding), max_length=512, max_new_tokens=64 if task == "ppo" else 0)
    imports_mb, imports = peak_mb(resource.RUSAGE_SELF), clocks()
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    done = clocks()
    data.val_dataloader()
    return {
        "training rows": len(loader.dataset),  # type: ignore[arg-type]
        "s": round(done[0] - imports[0], 2),
        "CPU s": round(done[1] - imports[1], 2),
        "s with imports": round(done[0], 2),
        "validation, s": round(clocks()[0] - done[0], 2),
        "MB after imports": imports_mb,
        "peak MB": peak_mb(resource.RUSAGE_SELF),
        "private MB": anonymous_mb(),
        "peak MB of a worker": peak_mb(resource.RUSAGE_CHILDREN),
        "tokens of the first batch": int(batch.ids.numel()) if hasattr(batch, "ids") else 0,
    }


def clocks() -> tuple[float, float]:
    """Seconds since this process began, and CPU seconds of it and of the processes that it has waited for."""
    ticks = os.sysconf("SC_CLK_TCK")
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / ticks
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began, sum(os.times()[:4])


def peak_mb(whose: int) -> int:
    return round(resource.getrusage(whose).ru_maxrss / 1000)


def anonymous_mb() -> int:
    """Memory that belongs to no file, in MB, now."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(round(int(line.split()[1]) / 1000) for line in status if line.startswith("RssAnon"))


def compare(
    rows: list[int], oasst: list[int], tasks: list[str], encoding: str, workers: int
) -> Iterator[dict[str, Any]]:
    """A row for each file, task and start."""
    for kind, count in [*(("rows", n) for n in rows), *(("OASST", n) for n in oasst)]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.jsonl"
            with path.open("w") as file:
                for row in simple_rows(count) if kind == "rows" else oasst_rows(count):
                    file.write(json.dumps(row) + "\n")
            for task in tasks:
                cache = Path(folder) / task
                command = [sys.executable, __file__, "--start", str(path), "--task", task, "--cache", str(cache)]
                command += ["--encoding", encoding, "--workers", str(workers)]
                for turn in ("first", "second"):
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    cached = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
                    yield {
                        "file": f"{count:,} {kind}" + (" messages" if kind == "OASST" else ""),
                        "rows": count,
                        "MB": round(path.stat().st_size / 1e6),
                        "task": task,
                        "start": turn,
                        **json.loads(done.stdout.splitlines()[-1]),
                        "cache MB": round(cached / 1e6),
                    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and peak memory over the number of rows, a line for each task and start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("s", "peak MB"), ("seconds", "peak MB"), strict=True):
        for task, turn in dict.fromkeys((row["task"], row["start"]) for row in rows):
            points = [(row["rows"], row[key]) for row in rows if (row["task"], row["start"]) == (task, turn)]
            style = "-" if turn == "second" else "--"
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=f"{task}, {turn} start")
        axes.set(xlabel="rows", ylabel=label, xscale="log", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--oasst", type=int, nargs="*", default=[], help="messages")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=["sft", "ppo"])
    parser.add_argument("--encoding", default="rlchat_1k")
    parser.add_argument("--workers", type=int, default=0, help="data.num_workers")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw seconds and memory into this PNG file")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start, options.task[0], options.cache, options.encoding, options.workers)))
        return
    found = []
    for row in compare(options.rows, options.oasst, options.task, options.encoding, options.workers):
        print(json.dumps(row), flush=True)
        found.append(row)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
