"""lm-evaluation-harness on a base model and on rlchat's export of it without training: the scores must be equal.

    make .venv-lm-eval/installed
    python benchmarks/lm_evaluation.py FOLDER --python .venv-lm-eval/bin/python [--serve]

FOLDER is a base model with tokenizer.json and a chat template. The script makes a model file of it with one step of SFT
at learning rate 0, and exports the file. It scores both folders on the 64 multiple-choice questions of lm_eval_task,
with the plain question and with the chat template. `--python` is an environment with lm_eval and without rlchat.

With `--serve`, `rlchat serve` answers lm_eval's model `local-completions` too. The server excludes ids that a response
cannot contain, so its log-likelihoods differ slightly. It opens each plain text as a response, which the other models
do not do, so this part uses the chat template only.

The exit code is 1 if a score or the answer to a question differs. lm_eval's files stay in `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

TASK = Path(__file__).parent / "lm_eval_task"
NAME = "rlchat_questions"
# Two conversations are in the training split and one in the validation split, after which the model file is written.
CONVERSATIONS = ("Hello", "Hello."), ("Thanks", "You are welcome."), ("Bye", "Goodbye.")
# Training one layer keeps the checkpoint small; the learning rate of 0 keeps its weights too.
UNTRAINED = """
fit --config sft --data.path data.jsonl --data.val_fraction 0.5 --data.test_fraction 0
--model.max_length 1024 --model.hidden_dim 0 --model.max_new_tokens 1 --model.learning_rate 0 --model.train_layers 1
--trainer.max_epochs 1
"""


class Scores(NamedTuple):
    """What lm_eval found for one model."""

    metrics: dict[str, float]
    likelihoods: list[list[float]]  # of each choice of each question, in nats

    @property
    def answers(self) -> list[int]:
        """The number of the most likely choice of each question."""
        return [row.index(max(row)) for row in self.likelihoods]


def main() -> None:
    options = parsed_options()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model, exported = export_untrained(options.base_model.resolve(), out)
    python = Path(options.python).absolute()
    equal = True
    for chat in (False, True):
        form = "chat" if chat else "plain"
        original = evaluate(python, out / f"original-{form}", hf(options.base_model.resolve()), chat)
        print(f"{form:<5} original: {shown(original)}", flush=True)
        export = evaluate(python, out / f"exported-{form}", hf(exported), chat)
        equal &= compare(f"{form:<5} exported", original, export)
        if chat and options.serve:
            with serving(model) as url:
                where = f"base_url={url}/v1/completions,model={model.stem}"
                arguments = f"{where},tokenizer={exported},tokenizer_backend=huggingface"
                served = evaluate(python, out / f"served-{form}", ["local-completions", arguments], chat)
            equal &= compare(f"{form:<5} served", original, served)
    sys.exit(not equal)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare lm_eval's scores of a base model and of its export.")
    parser.add_argument("base_model", type=Path, help="a folder with weights, tokenizer and chat template")
    parser.add_argument("--python", default=".venv-lm-eval/bin/python", help="an interpreter that can import lm_eval")
    parser.add_argument("--serve", action="store_true", help="also score the model behind `rlchat serve`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".lm_evaluation")
    return parser.parse_args()


def export_untrained(base_model: Path, out: Path) -> tuple[Path, Path]:
    """The model file and the exported folder of ``base_model`` without training."""
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in CONVERSATIONS
    ]
    (out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rlchat(out, *UNTRAINED.split(), "--model.base_model", str(base_model))
    model, exported = out / "checkpoints" / "sft_model.pt", out / "exported"
    rlchat(out, "export", str(model), "--to", "hf", str(exported), "--force")
    return model, exported


def rlchat(folder: Path, *arguments: str) -> None:
    """Runs a command of rlchat in ``folder``; its output is in rlchat.log there."""
    with (folder / "rlchat.log").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "rlchat", *arguments]
        subprocess.run(command, cwd=folder, env=with_rlchat(), stdout=log, stderr=log, check=True)


def with_rlchat() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def hf(folder: Path) -> list[str]:
    """lm_eval's model and arguments for a folder that transformers loads."""
    return ["hf", f"pretrained={folder},dtype=float32"]


def evaluate(python: Path, out: Path, model: list[str], chat: bool) -> Scores:
    """Runs the task with lm_eval, without a network."""
    name, arguments = model
    command = [str(python), "-m", "lm_eval", "run", "--model", name, "--model_args", arguments, "--tasks", NAME]
    command += [
        "--include_path",
        ".",
        "--output_path",
        str(out),
        "--log_samples",
        "--device",
        "cpu",
        "--batch_size",
        "8",
    ]
    if chat:
        command.append("--apply_chat_template")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out.parent / "hf_home"), "NO_PROXY": "127.0.0.1"}
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=TASK, env=environment, stdout=log, stderr=log, check=True)
    return read_scores(out)


def read_scores(out: Path) -> Scores:
    """The scores of the last run that wrote to ``out``."""
    results, samples = (max(out.rglob(pattern)) for pattern in ("results_*.json", f"samples_{NAME}_*.jsonl"))
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))["results"][NAME]
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    likelihoods = [[float(nats) for nats, _ in row["filtered_resps"]] for row in rows]
    return Scores({metric: found[f"{metric},none"] for metric in ("acc", "acc_norm")}, likelihoods)


def compare(label: str, original: Scores, other: Scores) -> bool:
    """Prints how ``other`` differs from ``original``; returns whether scores and answers are the same."""
    differing = sum(a != b for a, b in zip(original.answers, other.answers, strict=True))
    pairs = zip(original.likelihoods, other.likelihoods, strict=True)
    most = max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
    print(
        f"{label}: {shown(other)}; {differing} other answers; log-likelihoods differ by at most {most:.1e}", flush=True
    )
    return original.metrics == other.metrics and not differing


def shown(scores: Scores) -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in scores.metrics.items())
    return f"{metrics} on {len(scores.likelihoods)} questions"


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """The URL of `rlchat serve` with ``model``, as long as the context lasts."""
    command = [sys.executable, "-m", "rlchat", "serve", str(model), "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, cwd=model.parent, env=with_rlchat(), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            if (found := re.search(r"http://[\w.:]+", server.stdout.readline())) is None:
                raise SystemExit("rlchat serve did not start")
            yield found[0]
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
