"""Signals to runs of one process and of two: each stops after its batch, says so, and loses nothing.

python -m prove.stop_signals      (`make prove` runs it)
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from prove.kill_and_resume import PPO, RESUME, compare
from prove.runs import complete, finish, fit_words, newest_checkpoint, prepare, start, tail, trace

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def stop_and_resume(folder: Path, ranks: int, numbers: Sequence[signal.Signals], whole: Path, fit: list[str]) -> None:
    """Sends each of ``numbers`` to the first process alone, some batches after it began; then trains to the end."""
    broken = prepare(folder)
    for number in numbers:
        seen = len(trace(broken))
        run = start(broken, fit + (RESUME if seen else []))
        while len(trace(broken)) < seen + 2:
            assert run.poll() is None, tail(broken)
            time.sleep(0.02)
        run.send_signal(number)
        code = finish(run, broken, 60)
        assert code == CODES[number], f"exit code {code}:\n{tail(broken)}"
        assert newest_checkpoint(broken).stat().st_mtime > time.time() - 60
        print(f"{number.name} to {ranks} processes: after batch {trace(broken)[-1]['batch']}", flush=True)
    complete(broken, fit + RESUME)
    report = compare(whole, broken, ranks, 0)
    assert report.repeated == 0, "batches were trained twice"


def main() -> None:
    for ranks in (1, 2):
        words = [*(word.format(batch=8 // ranks) for word in PPO), "--trainer.max_epochs=8"]
        fit = fit_words([*words, "--best_model.save_last_every=0"], ranks)
        with tempfile.TemporaryDirectory() as place:
            whole = prepare(Path(place, "whole"))
            complete(whole, fit)
            stop_and_resume(Path(place, "broken"), ranks, [signal.SIGTERM, signal.SIGINT] * 2, whole, fit)
        print(f"{ranks} processes: 4 stops, no batch lost and none trained twice, not a bit differs", flush=True)


if __name__ == "__main__":
    main()
