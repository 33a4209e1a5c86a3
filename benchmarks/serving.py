"""Throughput of continuous batching, N concurrent requests against the same N one after another, and latency.

    python benchmarks/serving.py [MODEL] --requests 64 --tokens 64 [--stream] [--json FILE]

Both are measured against one `rlchat serve` process, over HTTP, with the same prompts and seeds, so that both generate
the same tokens. They take turns, and figures are medians over turns, ratios pair by pair. Without MODEL, it uses random
weights in the shape of the demo's model; their responses have all `--tokens`, a trained model's end earlier.

Latency is that of small requests on one connection that is kept alive, with the server's CPU time. The work of a
response of one token, without HTTP, is measured in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from rlchat.conversation import Conversation, Message
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, load_policy, new_policy, save_bundle
from rlchat.models.sampling import Sampling, addressed_uniforms, sample
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

SHAPE = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}


def random_model(path: Path) -> Path:
    """A model file with the demo's shape and random weights, whose responses never end early."""
    torch.manual_seed(0)
    tokenizer = ChatTokenizer("rlchat_1k")
    backbone = Backbone({**SHAPE, "num_attention_heads": 4}, tokenizer.vocab_size, 512)
    save_bundle(path, PolicyBundle(new_policy(backbone, tokenizer), tokenizer, 512))
    return path


@contextmanager
def server(model: Path, *more: str) -> Iterator[str]:
    """The URL of a server of ``model``; ``more`` are further options."""
    command = [sys.executable, "-m", "rlchat", "serve", str(model), "--port", "0", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            found = re.search(r" is at (http\S+)", process.stdout.readline())
            if found is None:
                sys.exit("the server did not start: its message is above")
            yield found[1]
        finally:
            process.terminate()


def question(number: int) -> str:
    """The user's message of request ``number``."""
    return f"What is {number} + {number % 7}? {'Please. ' * (number % 5)}"


async def chat(client: httpx.AsyncClient, number: int, tokens: int, stream: bool = False) -> tuple[float, int]:
    """The latency in seconds of request ``number``, and the number of tokens of its response."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question(number)}],
        "max_tokens": tokens,
        "temperature": 1,
        "seed": number,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    text = (await client.post("/v1/chat/completions", json=body)).raise_for_status().text
    latency = time.perf_counter() - began
    last = text.split("data: ")[-2] if stream else text  # the event before [DONE]
    return latency, json.loads(last)["usage"]["completion_tokens"]


async def processor_seconds(client: httpx.AsyncClient) -> float:
    """CPU seconds of the server's process; NaN if its metrics do not have them."""
    found = re.search(r"^process_cpu_seconds_total (\S+)$", (await client.get("/metrics")).text, re.M)
    return float(found[1]) if found else math.nan


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile, without the first ones, which warm up."""
    ordered = sorted(seconds[len(seconds) // 10 :])
    return {"median_ms": 1000 * statistics.median(ordered), "p95_ms": 1000 * ordered[int(0.95 * len(ordered))]}


async def latencies(url: str, model: Path, count: int = 200) -> dict[str, dict[str, float]]:
    """Latencies on one connection that is kept alive, and the time of the work alone."""
    results = {}
    work = work_of_one_token(model)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def health() -> None:
            (await client.get("/health")).raise_for_status()

        async def one_token() -> None:
            await chat(client, 0, 1)

        async def work_alone() -> None:
            work()

        asked: dict[str, Callable[[], Awaitable[None]]] = {
            "GET /health": health,
            "a chat of one token": one_token,
            "its work without HTTP": work_alone,
        }
        for name, request in asked.items():
            seconds = []
            before, own = await processor_seconds(client), time.process_time()
            for _ in range(count):
                began = time.perf_counter()
                await request()
                seconds.append(time.perf_counter() - began)
            theirs = await processor_seconds(client) - before
            used = time.process_time() - own if request is work_alone else theirs
            row = results[name] = {**milliseconds(seconds), "cpu_ms": 1000 * used / count}
            print(
                f"{name:<22} {row['median_ms']:6.1f} ms median {row['p95_ms']:6.1f} ms 95th {row['cpu_ms']:6.1f} ms CPU"
            )
    return results


def work_of_one_token(model: Path) -> Callable[[], None]:
    """Encodes the prompt of request 0 and samples one token, in this process and with one thread."""
    torch.set_num_threads(1)
    bundle = load_policy(model)
    uniforms = addressed_uniforms(0, 0, torch.arange(1))
    special = {"end_id": bundle.tokenizer.end_id, "pad_id": bundle.tokenizer.pad_id}

    def work() -> None:
        prompt = Conversation((Message("user", question(0)),))
        ids = torch.tensor([bundle.tokenizer.render_prompt(prompt, bundle.max_length).ids])
        mask = torch.ones_like(ids, dtype=torch.bool)
        next(sample(bundle.model, ids, mask, Sampling(1, 1.0), uniforms, **special))

    return work


async def throughput(url: str, requests: int, tokens: int, rounds: int, stream: bool) -> dict[str, Any]:
    """Both ways in turn. The first turn of each is a warm-up."""
    limits = httpx.Limits(max_connections=requests, max_keepalive_connections=requests)
    ways: dict[str, list[dict[str, float]]] = {"one at a time": [], "at once": []}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for _ in range(rounds + 1):
            for way, turns in ways.items():
                before, began = await processor_seconds(client), time.perf_counter()
                if way == "at once":
                    replies = await asyncio.gather(*(chat(client, i, tokens, stream) for i in range(requests)))
                else:
                    replies = [await chat(client, i, tokens, stream) for i in range(requests)]
                seconds = time.perf_counter() - began
                count = sum(length for _, length in replies)
                turns.append(
                    {
                        "tokens": count,
                        "seconds": seconds,
                        "tokens_per_second": count / seconds,
                        "latency_ms": 1000 * statistics.median(latency for latency, _ in replies),
                        "server_cpu_seconds": await processor_seconds(client) - before,
                    }
                )
    pairs = list(zip(ways["one at a time"], ways["at once"], strict=True))[1:]
    result: dict[str, Any] = {"requests": requests, "max_tokens": tokens, "stream": stream}
    for way, turns in ways.items():
        result[way] = {key: statistics.median(turn[key] for turn in turns[1:]) for key in turns[0]}
    for name, key in (("speedup", "tokens_per_second"), ("cpu_share", "server_cpu_seconds")):
        result[name] = statistics.median(both[key] / one[key] for one, both in pairs)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the throughput as a table."""
    print(f"{result['requests']} requests   tokens   seconds  tokens/s  median latency  server's CPU seconds")
    for way in ("one at a time", "at once"):
        row = result[way]
        print(
            f"{way:<13} {row['tokens']:>7.0f} {row['seconds']:>9.2f} {row['tokens_per_second']:>9.0f}"
            f" {row['latency_ms']:>12.0f} ms {row['server_cpu_seconds']:>21.2f}"
        )
    speedup, share = result["speedup"], result["cpu_share"]
    print(f"at once: {speedup:.1f} times the tokens per second, {share:.2f} of the CPU seconds (medians of pairs)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="model file (default: random weights)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="maximum per response")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way, after one that does not count")
    parser.add_argument("--stream", action="store_true", help="ask for streamed responses")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or random_model(Path(folder) / "random.pt")
        with server(model) as url:
            result = {"latency": asyncio.run(latencies(url, model))}
            result |= asyncio.run(throughput(url, options.requests, options.tokens, options.rounds, options.stream))
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
