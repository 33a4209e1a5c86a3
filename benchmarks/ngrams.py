"""Perplexity of a unigram and a trigram model on the assistant tokens that `rlchat test` measures.

    python benchmarks/ngrams.py --encoding rlchat_1k --max_length 256 DATA.jsonl.gz

Split, tokens and truncation are those of `rlchat fit --config sft` with these options, so the figures are comparable
with the neural model's. The trigram uses Witten–Bell interpolation (1991), which has no parameters to tune. Every token
of a conversation serves as context; only assistant tokens are scored.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict

from rlchat.data.datamodule import DataNeeds, OASST2DataModule
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


class Trigram:
    """Interpolated counts: P(w | uv) = (c(uvw) + t(uv) · P(w | v)) / (c(uv) + t(uv)), t the number of distinct w."""

    def __init__(self, rows: list[list[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(3)]
        for row in rows:
            for order in range(3):
                self.counts[order].update(zip(*(row[i:] for i in range(order + 1)), strict=False))
        self.seen: list[dict[tuple[int, ...], int]] = []
        self.kinds: list[dict[tuple[int, ...], int]] = []
        for counts in self.counts:
            seen: dict[tuple[int, ...], int] = defaultdict(int)
            kinds: dict[tuple[int, ...], int] = defaultdict(int)
            for gram, count in counts.items():
                seen[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            self.seen.append(seen)
            self.kinds.append(kinds)

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        """P(``token`` | ``context``), the last tokens before it; () gives the unigram."""
        lower = self.probability(token, context[1:]) if context else 1 / self.vocabulary
        order = len(context)
        seen, kinds = self.seen[order].get(context, 0), self.kinds[order].get(context, 0)
        return (self.counts[order][(*context, token)] + kinds * lower) / (seen + kinds) if seen else lower


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of n-gram models on the held-out test split.")
    parser.add_argument("path", nargs="+", help="conversation files")
    parser.add_argument("--encoding", default="rlchat_1k")
    parser.add_argument("--max_length", type=int, default=256)
    options = parser.parse_args()
    tokenizer = ChatTokenizer(options.encoding)
    data = OASST2DataModule(options.path, batch_size=64)
    data.needs = DataNeeds("sft", tokenizer, options.max_length)
    data.prepare_data()
    data.setup("fit")
    rows = [
        row[mask].tolist()
        for batch in data.train_dataloader()
        for row, mask in zip(batch.ids, batch.attention_mask, strict=True)
    ]
    model = Trigram(rows, tokenizer.vocab_size)
    nll: Counter[str] = Counter()
    tokens = 0
    for batch in data.test_dataloader()[0]:
        for row, loss_mask in zip(batch.ids.tolist(), batch.loss_mask.tolist(), strict=True):
            for place in (i for i, counts in enumerate(loss_mask) if counts):
                tokens += 1
                for name, width in (("unigram", 0), ("trigram", 2)):
                    context = tuple(row[max(0, place - width) : place]) if width else ()
                    nll[name] -= math.log(model.probability(row[place], context))
    print(f"{tokens:,} test tokens, trained on {sum(map(len, rows)):,}")
    for name, total in nll.items():
        print(f"{name} perplexity {math.exp(total / tokens):.2f}")


if __name__ == "__main__":
    main()
