"""Which size should the packaged encoding have? Bytes a token, and what a token costs the demo's model.

    python benchmarks/encodings.py DEMO.jsonl OTHER.jsonl.gz [MORE ...]

Trains byte-pair encodings of 512 to 4,096 tokens on the first two files together, and prints for each file how many
bytes a token holds, and for the demo's model (3 layers × 128) the operations a conversation takes: a smaller vocabulary
has a cheaper head, a larger one shorter conversations.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from rlchat.conversation import Conversation
from rlchat.data.formats import Tree, read_trees
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer, format_ranks, train_ranks

TRUNK_PARAMETERS = 3 * (4 * 128 * 128 + 3 * 128 * 344)
WIDTH = 128


def texts(trees: list[Tree]) -> list[str]:
    """Every message once."""
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    asked = [prompt.messages[-1].text for prompt in prompts if prompt.messages]
    return asked + [reply.text for prompt in prompts for reply in prompt.references]


def main(paths: list[str]) -> None:
    corpora = {Path(path).name: read_trees([path], progress=False)[0] for path in paths}
    by_name = {name: texts(trees) for name, trees in corpora.items()}
    training = [text for name in list(by_name)[:2] for text in by_name[name]]
    threads: list[Conversation] = [thread for tree in next(iter(corpora.values())) for thread in tree.threads]
    print("tokens  " + "  ".join(f"{name:>28}" for name in by_name) + "   demo tokens  Mflop a conversation")
    folder = Path(sys.argv[0]).parent / ".encodings"
    folder.mkdir(exist_ok=True)
    for size in (512, 1024, 2048, 4096):
        path = folder / f"{size}.tiktoken"
        path.write_bytes(format_ranks(train_ranks(iter(training), size)))
        tokenizer = ChatTokenizer(str(path))
        row = [f"{size:>6}"]
        for words in by_name.values():
            sample = words[:: max(1, len(words) // 20_000)]
            rate = sum(len(t.encode()) for t in sample) / sum(len(tokenizer.encode(t)) for t in sample)
            row.append(f"{rate:>20.2f} bytes/tok")
        rendered = [tokenizer.render(thread) for thread in threads]
        length = statistics.mean(len(r.ids) for r in rendered)
        said = statistics.mean(sum(r.loss_mask) for r in rendered)
        operations = 6 * (length * TRUNK_PARAMETERS + said * WIDTH * tokenizer.vocab_size) / 1e6
        print("  ".join(row) + f"   {length:>10.1f}  {operations:>10.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
