"""Time and memory of an iteration of PPO, next to the least that its arithmetic needs, and to TRL's PPO.

    python benchmarks/ppo.py --size S --critic shared separate
    python benchmarks/ppo.py --size S --critic shared separate --against trl     (after `make .venv-trl/installed`)
    python benchmarks/ppo.py --size S --shortest 8 --against trl                 (and with responses of 8 to 64 tokens)

An iteration is 64 prompts of 8 to 32 tokens, responses of 64 tokens, and 4 passes of 4 minibatches, in float32, through
Lightning's Trainer. The setup is that of `benchmarks/against_trl`. Size S is a GPT-2 with a vocabulary of 8,192 and
4 layers of width 128, size M one with a vocabulary of 50,257 and 6 layers of width 384.

Every run is a separate process with one thread. The contestants alternate, `--rounds` times; the first iteration of a
process is left out, and medians are taken. With --shortest, rlchat also runs with responses of different lengths, all
equally likely; TRL computes all tokens of the longest one for each response. CPU seconds are those of the whole
process; the phases are in wall-clock seconds, which mean something only on a quiet machine. The rollout includes the
log-probs of policy and reference. The floor is the number of operations divided by the speed of a matrix product of
this machine, plus the memory traffic of AdamW and the exponentials of the softmax.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "against_trl"))
from common import LONGEST_PROMPT, SHORTEST_PROMPT, SIZES, Hyperparameters, Size  # noqa: E402

TRL_PYTHON = HERE.parent / ".venv-trl" / "bin" / "python"
PHASES = ("rollout_s", "update_s")


def seconds_of(work: Callable[[], Any], repeats: int = 7) -> float:
    """The shortest CPU time of ``work``."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def peaks() -> dict[str, float]:
    """What one thread of this machine reaches: GFLOP/s of a product, GB/s of a copy, 10⁹ exponentials per s."""
    torch.set_num_threads(1)
    a, b, long = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(2**24)
    small, into = torch.randn(2**18), torch.empty_like(long)
    return {
        "GFLOP/s": 2 * 1024**3 / seconds_of(lambda: a @ b) / 1e9,
        "GB/s": 2 * 4 * len(long) / seconds_of(lambda: into.copy_(long)) / 1e9,
        "Gexp/s": len(small) / seconds_of(lambda: small.exp()) / 1e9,
    }


def floor(size: Size, critic: str, h: Hyperparameters, peak: dict[str, float], new: float) -> float:
    """CPU seconds of the arithmetic of an iteration with responses of ``new`` tokens, at the peaks of the machine."""
    rows, prompt = h.batch_size, (SHORTEST_PROMPT + LONGEST_PROMPT) / 2
    trunk, head = 12 * size.layers * size.width**2, size.vocabulary * size.width  # weights
    networks = 1 if critic == "shared" else 2

    def attention(tokens: float) -> float:  # operations for each token of a causal row
        return 4 * size.layers * size.width * tokens / 2

    forward = rows * (prompt + new) * (2 * trunk + attention(prompt + new))
    to_logits = rows * new * 2 * head
    rollout = rows * (prompt + new) * 2 * trunk + to_logits + rows * new * 2 * attention(prompt + new / 2)
    score = 2 * (forward + to_logits) + (networks - 1) * forward  # policy and reference, and a separate critic
    update = h.ppo_epochs * 3 * (networks * forward + to_logits)
    trained = networks * trunk + head
    adam = h.ppo_epochs * h.minibatches * trained * 28 / 1e9 / peak["GB/s"]
    exponentials = rows * new * size.vocabulary * (3 + h.ppo_epochs) / 1e9 / peak["Gexp/s"]
    return (rollout + score + update) / 1e9 / peak["GFLOP/s"] + adam + exponentials


def run(contestant: str, size: str, iterations: int, folder: Path) -> list[dict[str, float]]:
    """The rows of a run of ``contestant``, one per iteration, the first left out."""
    critic, _, shortest = contestant.partition(" ")
    out = folder / f"{critic}.json"
    script = "trl_side.py" if contestant == "trl" else "rlchat_side.py"
    python = str(TRL_PYTHON) if contestant == "trl" else sys.executable
    words = [python, str(HERE / "against_trl" / script), "--size", f"{size}64", "--out", str(out)]
    words += [] if contestant == "trl" else ["--critic", critic]
    words += ["--shortest", shortest.rstrip("+")] if shortest else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*words, "--set", f"iterations={iterations}"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    rows: list[dict[str, float]] = json.loads(out.read_text())["curve"]
    for before, row in zip(reversed(rows[:-1]), reversed(rows[1:]), strict=True):
        row["cpu_s"] -= before["cpu_s"]
    return rows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("S", "M"), default="S")
    parser.add_argument("--critic", choices=("shared", "separate"), nargs="+", default=["shared"])
    parser.add_argument("--against", choices=("trl",), help="also run TRL's PPO, in the environment .venv-trl")
    parser.add_argument("--shortest", type=int, help="also run with responses of this number of tokens and more")
    parser.add_argument("--iterations", type=int, default=4, help="per process; the first is left out")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contestant")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    if options.against and not TRL_PYTHON.exists():
        parser.error("TRL's environment is missing; run `make .venv-trl/installed`")
    lengths = ["", *([f" {options.shortest}+"] if options.shortest else [])]
    contestants = [critic + length for critic in options.critic for length in lengths]
    contestants += [options.against] if options.against else []
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    peak = peaks()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in contestants:
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                rows[name] += run(name, options.size, options.iterations, Path(folder))
                # Other programs slow down a single measurement of the speed; the best one is the machine's.
                peak = {unit: max(speed, peak[unit]) for unit, speed in peaks().items()}
    size, h = SIZES[f"{options.size}64"], Hyperparameters(0.0)
    print("one thread of this machine:", ", ".join(f"{value:.1f} {name}" for name, value in peak.items()))
    median = {name: statistics.median(row["cpu_s"] for row in found) for name, found in rows.items()}
    print(
        f"{'':11s} CPU s per iteration   ÷ floor  tokens per CPU s  peak MB  rollout, score, update (wall s)  TRL ÷ it"
    )
    for name, found in rows.items():
        critic, _, shortest = name.partition(" ")
        new = (int(shortest.rstrip("+")) + size.response) / 2 if shortest else size.response
        least = floor(size, "separate" if name == "trl" else critic, h, peak, new)
        phases = [statistics.median(row[phase] for row in found) for phase in PHASES] if name != "trl" else []
        ratio = f"{median['trl'] / median[name]:.2f}" if "trl" in median else ""
        print(
            f"{name:11s} {median[name]:19.2f} {median[name] / least:9.2f} {h.batch_size * new / median[name]:17.0f} "
            f"{max(row['peak_mb'] for row in found):8.0f}  {', '.join(f'{s:.2f}' for s in phases):24s}  {ratio}"
        )
    if options.json:
        options.json.write_text(json.dumps({"size": options.size, "peaks": peak, "iterations": rows}, indent=1))


if __name__ == "__main__":
    main()
