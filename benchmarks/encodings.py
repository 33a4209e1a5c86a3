"""Compares sizes of the packaged encoding: bytes per token, and the cost per conversation for the demo's model.

    python benchmarks/encodings.py DEMO.jsonl OTHER.jsonl.gz [MORE ...]

Trains byte-pair encodings of 512 to 4,096 tokens on the first two files together. Prints bytes per token for each file,
and the operations per conversation for the demo's model (3 layers × 128). A smaller vocabulary makes the output layer
cheaper; a larger one makes conversations shorter.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rlchat.conversation import Conversation
from rlchat.data.forest import Tree
from rlchat.data.formats import read_trees
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import format_ranks, train_ranks

BACKBONE_PARAMETERS = 3 * (4 * 128 * 128 + 3 * 128 * 344)
WIDTH = 128


def texts(trees: list[Tree]) -> list[str]:
    """The text of every message, once."""
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    questions = [prompt.messages[-1].text for prompt in prompts if prompt.messages]
    return questions + [response.text for prompt in prompts for response in prompt.references]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare sizes of the packaged encoding.")
    parser.add_argument("path", nargs="+", help="conversation files; the encodings are trained on the first two")
    paths = parser.parse_args().path
    corpora = {Path(path).name: read_trees([path], progress=False)[0] for path in paths}
    by_name = {name: texts(trees) for name, trees in corpora.items()}
    training = [text for name in list(by_name)[:2] for text in by_name[name]]
    threads: list[Conversation] = [thread for tree in next(iter(corpora.values())) for thread in tree.threads]
    print("tokens  " + "  ".join(f"{name:>28}" for name in by_name) + "   demo tokens  Mflop per conversation")
    folder = Path(__file__).parent / ".encodings"
    folder.mkdir(exist_ok=True)
    for size in (512, 1024, 2048, 4096):
        path = folder / f"{size}.tiktoken"
        path.write_bytes(format_ranks(train_ranks(iter(training), size)))
        tokenizer = ChatTokenizer(str(path))
        row = [f"{size:>6}"]
        for messages in by_name.values():
            sample = messages[:: max(1, len(messages) // 20_000)]
            rate = sum(len(t.encode()) for t in sample) / sum(len(tokenizer.encode(t)) for t in sample)
            row.append(f"{rate:>20.2f} bytes/tok")
        rendered = [tokenizer.render(thread) for thread in threads]
        length = statistics.mean(len(r.ids) for r in rendered)
        responses = statistics.mean(sum(r.loss_mask) for r in rendered)
        operations = 6 * (length * BACKBONE_PARAMETERS + responses * WIDTH * tokenizer.vocab_size) / 1e6
        print("  ".join(row) + f"   {length:>10.1f}  {operations:>10.1f}")


if __name__ == "__main__":
    main()
