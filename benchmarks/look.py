"""How fast `rlchat look` opens a large run, and how long its interactions take, in headless Chromium.

python benchmarks/look.py --rollouts 10000

It writes a run with made-up responses, opens it as a file and from the server, and prints milliseconds: until the first
rows and the first response are drawn, and of each interaction until its frame is drawn. Beside the time on the clock
stands the CPU time of the page's main thread, which other programs on the machine change less. Needs playwright and
Chromium (or the environment variable CHROMIUM).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rlchat.look.main import main as look
from rlchat.look.server import LookServer, Run

PROMPTS = 500
PER_ITERATION = 64
WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "house",
    "tree",
    "green",
    "small",
    "old",
    "runs",
    "sleeps",
    "eats",
    "in",
    "on",
    "under",
    "with",
    "very",
    "and",
    "but",
    "not",
]

# In the page: runs an interaction, and resolves with the milliseconds until the frame that shows it is drawn.
TIMED = """
async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  await frame();
  const start = performance.now();
  { CODE }
  await frame();
  return performance.now() - start;
}
"""
KEY = "document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true}))"
SEARCH = "const s = document.getElementById('search'); s.value = '%s'; s.dispatchEvent(new Event('input'))"
SORT = "const s = document.getElementById('sort'); s.value = '%s'; s.dispatchEvent(new Event('change'))"
INTERACTIONS = {
    "next response (j)": [KEY % "j"] * 10,
    "color (1 to 5)": [KEY % key for key in "1234512345"],
    "search": [SEARCH % text for text in ("d", "do", "dog", "dog r", "", "t", "the", "the x", "zzz", "")],
    "sort": [SORT % name for name in ("reward", "KL", "length", "highest KL of a token", "iteration")] * 2,
    "end reason": [
        f"const s = document.getElementById('ended'); s.value = '{value}'; s.dispatchEvent(new Event('change'))"
        for value in ("token limit", "")
    ]
    * 5,
    "prompts (p)": [KEY % "p"] * 10,
    "scroll": [f"document.getElementById('list').scrollTop = {place}" for place in range(0, 500_000, 50_000)],
}


def row(number: int, generator: random.Random, tokens: int) -> dict[str, Any]:
    """One made-up response."""
    count = generator.randint(tokens // 2, tokens)
    texts = [f" {generator.choice(WORDS)}" for _ in range(count)]
    columns = {
        name: [float(f"{generator.gauss(0, 1):.4g}") for _ in range(count)]
        for name in ("logprob", "kl", "entropy", "advantage", "value", "ratio")
    }
    prompt = f"Question {number * 7919 % PROMPTS}: what does the {WORDS[number % PROMPTS % 20]} do?"
    factors = {name: float(f"{generator.gauss(0, 1):.4g}") for name in ("learned_quality", "missing_end", "too_long")}
    return {
        "version": 2,
        "iteration": 1 + number // PER_ITERATION,
        "prompt_id": f"{number * 7919 % PROMPTS:012x}",
        "prompt": [{"role": "user", "content": prompt}],
        "reply": "".join(texts).strip(),
        "tokens": count,
        "ended_by": "end of turn" if generator.random() < 0.8 else "token limit",
        "reward": sum(factors.values()),
        "factors": factors,
        "kl": sum(columns["kl"]),
        "value": columns["value"][0],
        "per_token": {"text": texts, **columns},
    }


def write_run(folder: Path, rollouts: int, tokens: int) -> None:
    """A run with ``rollouts`` responses of at most ``tokens`` tokens, and its metrics."""
    generator = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "rollouts.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rollouts):
            file.write(json.dumps(row(number, generator, tokens), separators=(",", ":")) + "\n")
    names = [
        "train/reward",
        "train/kl",
        "train/value_loss",
        "train/entropy",
        "train/response_length",
        "reward/too_long",
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", *names])
        for step in range(rollouts // PER_ITERATION + 1):
            table.writerow([step, *(generator.gauss(step / 50, 1) for _ in names)])


class Page:
    """A page in the browser, and the CPU time of its main thread."""

    def __init__(self, browser: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1400, "height": 900})
        self.tools = self.page.context.new_cdp_session(self.page)
        self.tools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def cpu(self) -> float:
        """Milliseconds so far."""
        metrics = self.tools.send("Performance.getMetrics")["metrics"]
        return 1e3 * next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def open(self, url: str) -> tuple[float, float]:
        """Milliseconds from the navigation until the first rows and a response are drawn: on the clock, and of CPU."""
        self.page.goto(url, wait_until="commit")
        drawn = "() => document.querySelector('.row') && document.querySelector('.tokens') && performance.now()"
        clock = self.page.wait_for_function(drawn).json_value()  # tried in each frame
        return clock, self.cpu()

    def interact(self, code: str) -> tuple[float, float]:
        """Milliseconds of the interaction ``code``: on the clock, and of CPU."""
        before = self.cpu()
        return self.page.evaluate(TIMED.replace("CODE", code)), self.cpu() - before


def tell(what: str, times: list[tuple[float, float]]) -> None:
    """Prints the medians of (clock, CPU), and the longest."""
    clock, cpu = zip(*times, strict=True)
    shown = [f"{statistics.median(column):.0f} ms{{}} (at most {max(column):.0f})" for column in (clock, cpu)]
    print(f"{what}: {shown[0].format('')}, {shown[1].format(' of CPU')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=24, help="the maximum number of tokens in a response")
    parser.add_argument("--repeats", type=int, default=5, help="how often the page is opened")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as runner:
        folder, out = Path(place, "ppo", "version_0"), Path(place, "page.html")
        write_run(folder, options.rollouts, options.tokens)
        start, cpu = time.perf_counter(), time.process_time()
        look([str(folder), "--out", str(out)])
        seconds = time.perf_counter() - start, time.process_time() - cpu
        tell("rlchat look --out", [(1e3 * seconds[0], 1e3 * seconds[1])])
        print(f"the file: {out.stat().st_size / 2**20:.1f} MiB")
        browser = runner.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        # A new page has a new process, which has used no CPU yet.
        tell("open the file", [Page(browser).open(out.as_uri()) for _ in range(options.repeats)])
        run = Run(folder)
        run.chunk()  # as the command does before it prints the address
        with LookServer([run], ["ppo/version_0"], 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            tell("open from the server", [Page(browser).open(server.url) for _ in range(options.repeats)])
            server.shutdown()
        page = Page(browser)
        page.open(out.as_uri())
        for name, codes in INTERACTIONS.items():
            tell(name, [page.interact(code) for code in codes])
        browser.close()


if __name__ == "__main__":
    main()
