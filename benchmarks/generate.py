"""Tokens per second of `sample`, with which rlchat samples responses, and of `generate()` of transformers.

    python benchmarks/generate.py --size S M --batch 1 16 64 --tokens 64
    python benchmarks/generate.py --size G L --batch 1 64 --tokens 128 --device cuda     (in bfloat16)

The sizes are those of `benchmarks/ppo.py` and `benchmarks/gpu.py`, with random weights and prompts of 32 tokens. Both
have the same weights and sample at temperature 1, and no response ends early. They take turns, and a ratio is the
median over turns. On a CPU, times are CPU seconds of one thread; on a GPU they are seconds, and the share of the
memory bandwidth counts the weights, keys and values that a step reads, against the speed of a copy. With --plot, the
ratios are drawn too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "against_trl")]
from common import LONGEST_PROMPT, SIZES, Size, initial_model  # noqa: E402
from gpu import peaks, weights_of  # noqa: E402
from rlchat_side import make_tokenizer, save_initial  # noqa: E402

from rlchat.models.model_file import load_policy  # noqa: E402
from rlchat.models.networks import RLChatModel  # noqa: E402
from rlchat.models.sampling import Sampling, addressed_uniforms, generate  # noqa: E402

NAMES = {"S": "S64", "M": "M64", "G": "G", "L": "L"}


def models(size: Size, device: str) -> tuple[RLChatModel, PreTrainedModel, int, int]:
    """The same weights for both sides, the id that ends a response, which is never sampled, and that of padding."""
    initial = initial_model(size, 0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        save_initial(initial, size, Path(folder) / "initial.pt")
        tokenizer = make_tokenizer(size, Path(folder))
        ours = load_policy(Path(folder) / "initial.pt").model.to(device, dtype).eval()
    ours.unsayable[tokenizer.end_id] = True
    return ours, initial.to(device, dtype).eval(), tokenizer.end_id, tokenizer.pad_id  # type: ignore[arg-type]


def seconds(work: Callable[[], Any], device: str) -> float:
    """CPU seconds, or seconds on a GPU."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def bytes_of_step(model: PreTrainedModel, size: Size, batch: int, tokens: int) -> float:
    """What an average step reads in bfloat16: all weights, and the keys and values of all rows."""
    trunk, head = weights_of(model)
    keys = 2 * size.layers * (size.key_heads or size.heads) * (size.width // size.heads)  # and values, of a token
    return 2 * (trunk + head) + 2 * batch * keys * (LONGEST_PROMPT + tokens / 2)


def compare(name: str, batches: list[int], tokens: int, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each batch size."""
    size = SIZES[NAMES[name]]
    ours, theirs, end_id, pad_id = models(size, device)
    bandwidth = None if device == "cpu" else peaks()[1]
    for batch in batches:
        ids = torch.randint(0, size.sayable, (batch, LONGEST_PROMPT), device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        uniforms = addressed_uniforms(0, 0, torch.arange(batch))
        sample = partial(
            generate, ours, ids, mask, Sampling(tokens, temperature=1.0), uniforms, end_id=end_id, pad_id=pad_id
        )
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "top_k": 0}
        reference = partial(theirs.generate, ids, attention_mask=mask.long(), pad_token_id=pad_id, **options)
        pairs = [(seconds(sample, device), seconds(reference, device)) for _ in range(rounds + 1)][1:]
        own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        row = {
            "size": name,
            "batch": batch,
            "tokens": tokens,
            "sample, tokens/s": round(batch * tokens / own),
            "generate(), tokens/s": round(batch * tokens / other),
            "ratio": round(statistics.median(b / a for a, b in pairs), 2),
        }
        if bandwidth is not None:
            read = bytes_of_step(theirs, size, batch, tokens) * tokens / 1e12
            row["share of bandwidth"] = round(read / own / bandwidth, 3)
        yield row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The ratio over the batch size, a line for each model size."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["size"] for row in rows):
        points = [(row["batch"], row["ratio"]) for row in rows if row["size"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"size {name}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="batch size", ylabel="times as fast as generate()", xscale="log", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(NAMES), nargs="+", default=["S", "M"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=64, help="sampled tokens of each response")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="turns, after one that does not count")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this PNG file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.size:
        for row in compare(name, options.batch, options.tokens, options.device, options.rounds):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
