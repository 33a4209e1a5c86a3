"""Throughput of continuous batching: N concurrent requests against the same N requests one after another.

    python benchmarks/serving.py [MODEL] --requests 64 --tokens 64

Both are measured in one run, against one `rlchat serve` process, over HTTP, with the same prompts and seeds, so that
both generate the same tokens. The first round of each is a warm-up. Without MODEL, it uses random weights in the shape
of the demo's model.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, new_policy, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

SHAPE = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3}


def random_model(path: Path) -> Path:
    """A model file with the demo's shape and random weights."""
    torch.manual_seed(0)
    tokenizer = ChatTokenizer("rlchat_1k")
    backbone = Backbone({**SHAPE, "num_attention_heads": 4}, tokenizer.vocab_size, 512)
    save_bundle(path, PolicyBundle(new_policy(backbone, tokenizer), tokenizer, 512))
    return path


async def one(client: httpx.AsyncClient, number: int, tokens: int) -> tuple[float, int]:
    """The latency in seconds of request ``number``, and the number of tokens of its response."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"What is {number} + {number % 7}? {'Please. ' * (number % 5)}"}],
        "max_tokens": tokens,
        "temperature": 1,
        "seed": number,
    }
    began = time.perf_counter()
    answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
    return time.perf_counter() - began, answer["usage"]["completion_tokens"]


async def processor_seconds(client: httpx.AsyncClient) -> float:
    """CPU seconds of the server's process; NaN if its metrics do not have them."""
    found = re.search(r"^process_cpu_seconds_total (\S+)$", (await client.get("/metrics")).text, re.M)
    return float(found[1]) if found else math.nan


async def latency_of_kept_connection(url: str, requests: int = 200) -> None:
    """Print the latency of small requests on one connection that is kept alive."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        seconds = []
        for _ in range(requests):
            began = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            seconds.append(time.perf_counter() - began)
    ordered = sorted(seconds[requests // 10 :])  # the first ones warm up
    median, high = statistics.median(ordered), ordered[int(0.95 * len(ordered))]
    print(f"kept-alive connection: {1000 * median:.1f} ms median, {1000 * high:.1f} ms 95th percentile for GET /health")


async def measure(url: str, requests: int, tokens: int, rounds: int) -> None:
    limits = httpx.Limits(max_connections=requests)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        speeds, costs = [], []
        print(f"{requests} requests   tokens   seconds  tokens/s  requests/s  median latency  server's CPU seconds")
        for name in ("one at a time", "at once"):
            seconds, used, latencies, count = [], [], [0.0], 0
            for _ in range(rounds + 1):
                before, began = await processor_seconds(client), time.perf_counter()
                if name == "at once":
                    replies = await asyncio.gather(*(one(client, i, tokens) for i in range(requests)))
                else:
                    replies = [await one(client, i, tokens) for i in range(requests)]
                seconds.append(time.perf_counter() - began)
                used.append(await processor_seconds(client) - before)
                latencies, count = [latency for latency, _ in replies], sum(length for _, length in replies)
            best, cpu = min(seconds[1:]), min(used[1:])  # the round with the least interference from other processes
            speeds.append(count / best)
            costs.append(cpu)
            latency = statistics.median(latencies) * 1000
            print(
                f"{name:<13} {count:>7} {best:>9.2f} {count / best:>9.0f} {requests / best:>11.1f} {latency:>12.0f} ms"
                f" {cpu:>21.2f}"
            )
        print(
            f"at once: {speeds[1] / speeds[0]:.1f} times the tokens per second, 1/{costs[0] / costs[1]:.1f} of the CPU"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of `rlchat serve`: at once against one at a time.")
    parser.add_argument("model", nargs="?", help="model file (default: random weights)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="maximum per response")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or random_model(Path(folder) / "random.pt")
        command = [sys.executable, "-m", "rlchat", "serve", str(model), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                line = server.stdout.readline()
                if " is at http" not in line:
                    sys.exit("the server did not start: its message is above")
                url = line.split()[3]
                asyncio.run(latency_of_kept_connection(url))
                asyncio.run(measure(url, options.requests, options.tokens, options.rounds))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
