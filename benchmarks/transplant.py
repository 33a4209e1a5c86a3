"""Held-out bits per byte of a base model under another vocabulary: its rows transplanted, against random rows.

    TIKTOKEN_CACHE_DIR=… python benchmarks/transplant.py --base-model FOLDER --encoding cl100k_base \
        --data sgd/train.jsonl.gz --validation sgd/dev.jsonl.gz --steps 25 100 --seeds 0 1 2

`--rows` names the starts to compare:

- `transplanted`: rlchat's default. Rows of tokens with the same bytes are copied, others start from their pieces.
- `random`: the option `new_embeddings`. All rows of embedding and head are random; the rest of the model is kept.
- `own`: the base model with its own tokenizer and chat template, for comparison. `--encoding` has no effect on it.

Bits per byte are the negative log2-likelihood of the text of all assistant messages in held-out conversations, divided
by their UTF-8 bytes. Markers are not scored. The conversations and their bytes are the same for every start. They are
scored right after loading, and again after each number of optimizer steps in `--steps`, in one run of SFT. The seed
sets the random rows, the order of the training data and dropout.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers

from rlchat import OASST2DataModule, SFTModule
from rlchat.conversation import Conversation, Message
from rlchat.data.formats import read_trees
from rlchat.data.splits import unit_hash
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad

STARTS: dict[str, dict[str, Any]] = {"transplanted": {}, "random": {"new_embeddings": True}, "own": {}}
BYTES_PER_TOKEN = 2  # held-out conversations have at most this many bytes for each token of --max-length


@dataclass(frozen=True)
class HeldOut:
    """Tokenized held-out conversations: ``scored[i][t]`` is True where ``ids[i][t]`` is text of the assistant."""

    ids: list[list[int]]
    scored: list[list[bool]]
    bytes: int  # UTF-8 bytes of the scored text

    @classmethod
    def of(cls, conversations: Sequence[Conversation], tokenizer: ChatTokenizer) -> HeldOut:
        """Whole conversations, however many tokens. Raises ValueError where ``tokenizer`` does not keep every byte."""
        ids, scored, count = [], [], 0
        for conversation in conversations:
            rendered = tokenizer.render(conversation)
            ids.append(rendered.ids)
            sizes = [len(tokenizer.token_bytes(token)) for token in rendered.ids]
            scored.append([learn and size > 0 for learn, size in zip(rendered.loss_mask, sizes, strict=True)])
            here = sum(size for size, learn in zip(sizes, scored[-1], strict=True) if learn)
            expected = sum(len(m.text.encode()) for m in conversation.messages if m.role == "assistant")
            if here != expected:
                raise ValueError(f"{tokenizer.name} scores {here} of {expected} bytes of a conversation")
            count += here
        return cls(ids, scored, count)


def held_out_conversations(
    paths: Sequence[Path], training: Sequence[Path], count: int, most_bytes: int
) -> list[Conversation]:
    """``count`` conversations of ``paths`` in a fixed random order, none of which is in the ``training`` files.

    Each is cut to its first messages, up to an assistant message, with at most ``most_bytes`` UTF-8 bytes of text.
    """
    seen = {_text(thread) for tree in read_trees(training, progress=False)[0] for thread in tree.threads}
    found: dict[str, Conversation] = {}
    for tree in read_trees(paths, progress=False)[0]:
        for thread in tree.threads:
            messages = [Message(message.role, message.text.strip()) for message in thread.messages]
            while messages and (_size(messages) > most_bytes or messages[-1].role != "assistant"):
                messages.pop()
            if messages and _text(thread) not in seen:
                short = Conversation(tuple(messages))
                found[_text(short)] = short
    if not found:
        raise SystemExit(f"{paths[0]}: no conversation is short enough and absent from --data; raise --max-length")
    return [found[text] for text in sorted(found, key=lambda text: unit_hash(0, text))[:count]]


def _text(conversation: Conversation) -> str:
    return "\n".join(f"{message.role}: {message.text}" for message in conversation.messages)


def _size(messages: Sequence[Message]) -> int:
    return sum(len(message.text.encode()) for message in messages)


@torch.no_grad()
def bits_per_byte(module: SFTModule, held_out: HeldOut, batch_size: int) -> float:
    """The negative log2-likelihood of the scored tokens, each given all tokens before it, per byte of their text."""
    training, nats = module.model.training, 0.0
    module.model.eval()
    order = sorted(range(len(held_out.ids)), key=lambda row: len(held_out.ids[row]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        ids, mask = (
            x.to(module.device) for x in pad([held_out.ids[row] for row in rows], module.tokenizer.pad_id, "right")
        )
        scored = pad([held_out.scored[row] for row in rows], 0, "right")[0].bool().to(module.device)[:, 1:]
        stats = module.model.token_stats(module.model(ids, mask)[:, :-1][scored], ids[:, 1:][scored])
        nats -= float(stats.logprobs.double().sum())
    module.model.train(training)
    return nats / float(torch.log(torch.tensor(2.0))) / held_out.bytes


class Measure(L.Callback):
    """Collects bits per byte by the number of optimizer steps taken."""

    def __init__(self, held_out: HeldOut, steps: Sequence[int], batch_size: int) -> None:
        self.held_out, self.steps, self.batch_size = held_out, set(steps), batch_size
        self.by_step: dict[int, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.steps - self.by_step.keys():
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SFTModule)
        with trainer.precision_plugin.forward_context():
            self.by_step[trainer.global_step] = bits_per_byte(module, self.held_out, self.batch_size)


def run(start: str, seed: int, conversations: Sequence[Conversation], cache: str, options: Any) -> dict[str, Any]:
    """One start with one seed: bits per byte by step, and what they were measured on."""
    began = time.monotonic()
    L.seed_everything(seed, verbose=False)
    module = SFTModule(
        base_model=options.base_model,
        tiktoken_encoding=None if start == "own" else options.encoding,
        max_length=options.max_length,
        max_new_tokens=1,
        learning_rate=options.learning_rate,
        **STARTS[start],
    )
    held_out = HeldOut.of(conversations, module.tokenizer)
    measure = Measure(held_out, options.steps, options.batch_size)
    data = OASST2DataModule(
        [str(path) for path in options.data],
        batch_size=options.batch_size,
        val_fraction=0,  # the held-out conversations come from other files
        test_fraction=0,
        seed=seed,
        cache_dir=cache,
    )
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_steps=max(options.steps),
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    tokens = sum(map(sum, held_out.scored))
    return {
        "rows": start,
        "seed": seed,
        "bits_per_byte": measure.by_step,
        "bytes": held_out.bytes,
        "tokens": tokens,
        "skipped_steps": module.guard.skipped_steps,
        "seconds": round(time.monotonic() - began, 1),
    }


def table(runs: Sequence[dict[str, Any]], steps: Sequence[int]) -> str:
    """Mean and range over the seeds, as a Markdown table."""
    lines = ["| rows | after loading | " + " | ".join(f"after {step} steps" for step in steps) + " |"]
    lines.append("|---" * (len(steps) + 2) + "|")
    for start in dict.fromkeys(run["rows"] for run in runs):
        cells = [start]
        for step in (0, *steps):
            found = [run["bits_per_byte"][step] for run in runs if run["rows"] == start]
            cells.append(f"{sum(found) / len(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True, help="a transformers folder, or a GGUF file")
    parser.add_argument("--encoding", default="cl100k_base", help="a tiktoken encoding, or a packaged one")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="conversations to train on")
    parser.add_argument("--validation", nargs="+", type=Path, required=True, help="held-out conversations")
    parser.add_argument("--steps", nargs="+", type=int, default=[100], help="optimizer steps after which to score")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=STARTS, default=["transplanted", "random"])
    parser.add_argument("--batch-size", type=int, default=16, help="conversations in a batch")
    parser.add_argument("--max-length", type=int, default=256, help="the most tokens of a training conversation")
    parser.add_argument(
        "--held-out", type=int, default=200, help="held-out conversations to score, each of at most 2 bytes per token"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="the highest, of a cosine schedule")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true", help="as in lightning.Trainer, such as bf16-mixed")
    parser.add_argument("--json", type=Path, help="write every run to this file, as soon as it is done")
    options = parser.parse_args()
    if min(options.steps) < 1:
        parser.error("argument --steps: expected positive numbers; the score after loading is always shown")
    options.steps = sorted(set(options.steps))
    return options


def main() -> None:
    options = parsed()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    conversations = held_out_conversations(
        options.validation, options.data, options.held_out, BYTES_PER_TOKEN * options.max_length
    )
    values = {
        **vars(options),
        "data": [p.name for p in options.data],
        "validation": [p.name for p in options.validation],
    }
    values["base_model"] = Path(options.base_model).name
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "options": {name: value for name, value in values.items() if name != "json"},
    }
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for seed in options.seeds:
            for start in options.rows:
                runs.append(run(start, seed, conversations, cache, options))
                print(json.dumps(runs[-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    print(f"\n{len(conversations)} held-out conversations, {runs[0]['bytes']:,} bytes of responses, bits per byte:\n")
    print(table(runs, options.steps))


if __name__ == "__main__":
    main()
