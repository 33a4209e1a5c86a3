"""Measured checks of a real base model under rlchat: ids, logits, prompts, greedy replies, perplexity.

python benchmarks/base_models.py FOLDER --texts conversations.jsonl.gz … [--replies messages.jsonl.gz]

FOLDER is a transformers folder with weights, tokenizer.json and a chat template. `--texts` are JSON lines; every string
in them is compared. Each line of the report is a count of differences or a largest difference.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlchat.conversation import Conversation, Message
from rlchat.data.formats import read_trees
from rlchat.models.sampling import Sampling, generate, generator_uniforms
from rlchat.tokenizer.base_files import tokenizer_files
from rlchat.tokenizer.own import own_encoding
from rlchat.training.initial_model import open_policy

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Name three colors.",
    "Why is the sky blue?",
)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def texts_of(path: Path) -> list[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".json" not in path.name:
            return list(file)
        return [text for line in file if line.strip() for text in strings(json.loads(line))]


def compare_ids(folder: str, paths: list[Path]) -> None:
    files = tokenizer_files(folder)
    assert files is not None
    conversion = own_encoding(files)
    theirs = Tokenizer.from_str(json.dumps(files.tokenizer))
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    unused = set(conversion.encoding.unused)
    print(conversion.summary())
    for path in paths:
        start, wrong, with_unused = time.time(), [], 0
        texts = list(dict.fromkeys(texts_of(path)))
        for text in texts:
            ids = conversion.encoding.encode(text)
            expected = [conversion.moved.get(i, i) for i in theirs.encode(text, add_special_tokens=False).ids]
            if unused.intersection(ids):
                with_unused += 1
                ids = [token for token in ids if token not in unused]
            if ids != expected:
                wrong.append(text)
        print(
            f"{path.name}: {len(texts):,} texts, {len(wrong)} with other ids, {with_unused} hold bytes without a token "
            f"({time.time() - start:.0f} s) {[ascii(text[:40]) for text in wrong[:3]]}",
            flush=True,
        )


@torch.no_grad()
def compare_model(folder: str, replies: Path | None) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    bundle = open_policy(folder, None, 1024, None, None)
    model, tokenizer = bundle.model.eval(), bundle.tokenizer
    said = torch.tensor([i for i in range(theirs.config.vocab_size) if i not in set(tokenizer.unsayable_ids)])
    worst, same_prompts, same_replies = 0.0, 0, 0
    for question in QUESTIONS:
        prompt = tokenizer.render_prompt(Conversation((Message("user", question),))).ids
        messages = [{"role": "user", "content": question}]
        expected = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        same_prompts += prompt == expected
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids, dtype=torch.bool)
        difference = model.logits(model(ids, mask))[..., said] - theirs(ids).logits[..., said]
        worst = max(worst, float(difference.abs().max()))
        uniforms = generator_uniforms(torch.Generator(), 1)
        ours = generate(
            model, ids, mask, Sampling(40, 0.0), uniforms, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id
        ).ids[0]
        reference = theirs.generate(
            ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id
        )[0, ids.shape[1] :]
        same_replies += ours.tolist() == reference.tolist()
        print(f"  {question} -> {tokenizer.decode(ours.tolist())!r}", flush=True)
    print(
        f"largest difference of logits {worst:.1e}, equal prompts {same_prompts} and greedy replies {same_replies} of 5"
    )
    if replies is None:
        return
    trees, _ = read_trees([replies], lang="en", on_bad_line="skip", cure="")
    threads = [thread for tree in trees for thread in tree.threads][:40]
    ours_nll, their_nll, tokens = 0.0, 0.0, 0
    for thread in threads:
        rendered = tokenizer.render(thread, 512)
        ids = torch.tensor([rendered.ids])
        where = [n for n, learn in enumerate(rendered.loss_mask) if learn and n]
        if not where:
            continue
        hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, [n - 1 for n in where]]
        targets = ids[0, where]
        ours_nll -= float(model.token_stats(hidden, targets).logprobs.sum())
        logits = theirs(ids.clamp(max=theirs.config.vocab_size - 1)).logits[0, [n - 1 for n in where]]
        their_nll -= float(logits.log_softmax(-1).gather(-1, targets[:, None].clamp(max=logits.shape[-1] - 1)).sum())
        tokens += len(where)
    print(
        f"{len(threads)} threads, {tokens:,} tokens of replies: {ours_nll / tokens:.4f} nats per token, transformers "
        f"{their_nll / tokens:.4f} (it also gives probability to special tokens)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--texts", nargs="*", type=Path, default=[])
    parser.add_argument("--replies", type=Path)
    parser.add_argument("--ids-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compare_ids(options.folder, options.texts)
    if not options.ids_only:
        compare_model(options.folder, options.replies)


if __name__ == "__main__":
    main()
