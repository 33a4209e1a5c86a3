"""Signals to runs of one process, of two, and of two under torchrun: each stops after its batch and loses no work.

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


def stop_and_resume(
    folder: Path, ranks: int, numbers: Sequence[signal.Signals], whole: Path, fit: list[str], torchrun: bool = False
) -> None:
    """Sends each of the signals ``numbers`` to the started process after some batches; then trains to the end.

    The started process is the first process of the run, which must inform the others, or torchrun, which informs all.
    """
    broken = prepare(folder)
    for number in numbers:
        seen = len(trace(broken))
        words = fit + (RESUME if seen else [])
        if torchrun:
            elastic = [f"--nproc-per-node={ranks}", "--master-port=29511", "--module", "rlchat"]
            run = start(broken, [*elastic, *words], "torch.distributed.run")
        else:
            run = start(broken, words)
        while len(trace(broken)) < seen + 2:
            assert run.poll() is None, tail(broken)
            time.sleep(0.02)
        run.send_signal(number)
        code = finish(run, broken, 60)
        assert torchrun or code == CODES[number], f"exit code {code}:\n{tail(broken)}"  # torchrun has other codes
        assert newest_checkpoint(broken).stat().st_mtime > time.time() - 60
        print(f"{number.name}, {ranks} processes: after batch {trace(broken)[-1]['batch']}", flush=True)
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
            if ranks > 1:
                numbers = [signal.SIGTERM, signal.SIGINT]
                stop_and_resume(Path(place, "elastic"), ranks, numbers, whole, fit, torchrun=True)
                print(f"{ranks} processes under torchrun: 2 stops, the same", flush=True)


if __name__ == "__main__":
    main()
