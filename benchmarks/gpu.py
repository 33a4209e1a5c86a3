"""PPO on one GPU: GPT-2 124M and a Llama of 0.5 billion parameters, beside TRL. See also `benchmarks/generate.py`.

    python benchmarks/gpu.py ppo --size G L [--trl]      (with TRL 1.12 in the same environment)
    python benchmarks/gpu.py packing

The weights are random. `ppo` runs iterations of 128 prompts, responses of 128 tokens, and 4 passes of 4 minibatches,
in bfloat16 mixed precision, each contestant in a separate process. The first iteration is left out, and medians are
taken. The share of arithmetic is that of the speed that a product of two large matrices reaches on this GPU.
`packing` compares padded and packed batches: a forward and a backward pass of 12 layers of width 768 in bfloat16, by
the share of tokens in a batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "against_trl"))
from common import LONGEST_PROMPT, SHORTEST_PROMPT, SIZES, Size, initial_model  # noqa: E402

BATCH = 128  # prompts of an iteration
PASSES = 4


def seconds_of(work: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of ``work`` in seconds, after one call that does not count."""
    work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peaks() -> tuple[float, float]:
    """TFLOP/s of a bfloat16 product and TB/s of a copy, bytes read and written, on this GPU."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    x = torch.randn(2**30, device="cuda")
    y = torch.empty_like(x)

    def products() -> None:
        for _ in range(10):
            a @ b

    return 10 * 2 * 8192**3 / seconds_of(products) / 1e12, 2 * 4 * 2**30 / seconds_of(lambda: y.copy_(x)) / 1e12


def weights_of(model: PreTrainedModel) -> tuple[int, int]:
    """The numbers of weights in the layers and in the policy head."""
    head = model.get_output_embeddings().weight.numel()
    positions = sum(x.numel() for name, x in model.named_parameters() if name.endswith("wpe.weight"))
    return sum(x.numel() for x in model.parameters()) - head - positions, head


def update_flops(size: Size, critic: str) -> float:
    """Operations of the update of one iteration: forward and backward passes of all passes over the rollout."""
    with torch.device("meta"):
        trunk, head = weights_of(initial_model(size, 0))
    tokens = BATCH * ((SHORTEST_PROMPT + LONGEST_PROMPT) / 2 + size.response)
    networks = 1 if critic == "shared" else 2
    attention = 4 * size.layers * size.width * (tokens / BATCH) / 2
    forward = networks * tokens * (2 * trunk + attention) + BATCH * size.response * 2 * head
    return PASSES * 3 * forward


def ppo(name: str, contestants: list[str], iterations: int, peak: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """An iteration of each contestant."""
    for who in contestants:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "curve.json"
            script = "trl_side.py" if who == "trl" else "rlchat_side.py"
            words = [sys.executable, str(HERE / "against_trl" / script), "--gpu", "--size", name, "--out", str(out)]
            words += [] if who == "trl" else ["--critic", who]
            words += ["--set", f"iterations={iterations}", f"batch_size={BATCH}"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                yield {"size": name, "contestant": who, "error": done.stderr.strip()[-600:]}
                continue
            curve = json.loads(out.read_text())["curve"]
        for before, row in zip(reversed(curve[:-1]), reversed(curve[1:]), strict=True):
            row["wall_s"] -= before["wall_s"]
        wall = statistics.median(row["wall_s"] for row in curve[1:])
        tokens = BATCH * SIZES[name].response
        row = {"size": name, "contestant": who, "s": round(wall, 3), "tokens/s": round(tokens / wall)}
        row["peak MB"] = max(row["peak_mb"] for row in curve)
        if who != "trl":
            phases = {p: statistics.median(row[p] for row in curve[1:]) for p in ("rollout_s", "update_s")}
            share = update_flops(SIZES[name], who) / phases["update_s"] / 1e12 / peak[0]
            row |= {**phases, "share of arithmetic in the update": round(share, 3)}
        yield row


def packing() -> Iterator[dict[str, Any]]:
    """Milliseconds of a forward and a backward pass of a padded and of a packed batch."""
    from rlchat.models.backbones import Backbone
    from rlchat.models.packing import plan_packing

    backbone = Backbone({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12}, 8192, 512).cuda()
    for rows, width in ((32, 160), (16, 512), (64, 256), (128, 512)):
        for share in (0.95, 0.8, 0.65, 0.5):
            generator = torch.Generator().manual_seed(0)
            padding = (torch.rand(rows, generator=generator) * 2 * (1 - share) * width).long().clamp(max=width - 1)
            mask = (torch.arange(width) < width - padding[:, None]).cuda()
            ids = torch.randint(0, 8192, (rows, width), generator=generator).cuda()

            def padded(ids: torch.Tensor = ids) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    hidden = backbone.transformer(ids, use_cache=False).last_hidden_state
                hidden.sum().backward()

            def packed(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
                plan = plan_packing(ids, mask)
                assert plan is not None
                with torch.autocast("cuda", torch.bfloat16):
                    hidden = torch.nn.functional.embedding(plan.source, backbone.packed(ids, plan))
                hidden.sum().backward()

            row: dict[str, Any] = {"rows": rows, "width": width, "share": round(float(mask.float().mean()), 2)}
            yield row | {"padded ms": 1000 * seconds_of(padded), "packed ms": 1000 * seconds_of(packed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ppo", "packing"))
    parser.add_argument("--size", choices=("G", "L"), nargs="+", default=["G", "L"])
    parser.add_argument("--critic", choices=("shared", "separate"), nargs="+", default=["shared", "separate"])
    parser.add_argument("--trl", action="store_true", help="also run TRL's PPO")
    parser.add_argument("--iterations", type=int, default=4, help="per process; the first is left out")
    options = parser.parse_args()
    peak = peaks()
    print(f"{torch.cuda.get_device_name()}: {peak[0]:.0f} TFLOP/s in bfloat16, {peak[1]:.2f} TB/s", flush=True)
    torch.cuda.empty_cache()
    if options.what == "packing":
        for row in packing():
            print(json.dumps(row), flush=True)
        return
    for name in options.size:
        contestants = [*options.critic, *(["trl"] if options.trl else [])]
        for row in ppo(name, contestants, options.iterations, peak):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
