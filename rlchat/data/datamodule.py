"""The data of all three stages: JSONL files in, batches out.

    rlchat fit --config sft --data.path trees.jsonl.gz

The LightningModule says what it needs (:class:`DataNeeds`), and :class:`OASST2DataModule` gives it that: sequences for
SFT, ranked replies for the reward model, prompts for PPO.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from rlchat.conversation import Conversation
from rlchat.data.batches import (
    BatchLoader,
    Plan,
    PromptBatch,
    PromptRows,
    RankedBatch,
    RankedRows,
    RankSampler,
    SequenceBatch,
    SequenceRows,
    bucketed_plan,
    fixed_plan,
    full_batches_plan,
)
from rlchat.data.corpus import Corpus, CorpusCache, DataNeeds, cache_key, render_prompts, tokenize_trees
from rlchat.data.formats import read_prompts, read_trees
from rlchat.errors import UserError

__all__ = ["DataNeeds", "OASST2DataModule", "PromptBatch", "RankedBatch", "SequenceBatch", "split_trees"]

_log = logging.getLogger("rlchat")

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class OASST2DataModule(LightningDataModule):
    """Conversations from JSONL files in OASST2's format, or any other that :mod:`rlchat.data.formats` reads.

    Trees are split into train, validation and test by a hash of (seed, tree id), so that a tree stays on its side when
    the data grows, in every stage. From three trees on, no split that was asked for is empty. Fewer cannot be split:
    all of them are then trained on and validated on, with a warning.

    Args:
        path: The data file, or several.
        batch_size: Rows a training batch holds on each device: threads in SFT, prompts in the other stages.
        val_batch_size: The same for validation, test and prediction; ``batch_size`` where it is not given.
        lang: The language of the trees to keep; null keeps all.
        on_bad_line: Stop at a line that cannot be read, or count it and go on.
        keep_synthetic: Whether to keep messages that a model wrote.
        contrast: For a reward model on data that nobody ranked or labelled: a reply is better than the one to another
            turn of the same conversation.
        val_fraction: The share of trees to validate on; 0 turns validation off.
        test_fraction: The share of trees kept for ``rlchat test``.
        seed: Decides the split and the order of training.
        max_val_prompts: Validate replies on so many prompts at most, always the same ones; null takes all.
        num_workers: Processes that make batches ahead of time.
        cache_dir: Where tokenised data is kept; by default ``rlchat`` in the user's cache folder.
        predict_path: The prompts of ``rlchat predict``: JSONL, or a ``.txt`` file with a prompt on each line.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        lang: str | None = "en",
        on_bad_line: Literal["error", "skip"] = "error",
        keep_synthetic: bool = False,
        contrast: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        max_val_prompts: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        predict_path: str | None = None,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "val_batch_size": val_batch_size, "max_val_prompts": max_val_prompts}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise UserError(f"data.{name} is {count}; it must be at least 1")
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}; give 0 or more")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave nothing to train on; "
                f"give shares from 0 that sum to less than 1"
            )
        self.paths = [path] if isinstance(path, str) else list(path or [])
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.lang = lang
        self.on_bad_line = on_bad_line
        self.keep_synthetic = keep_synthetic
        self.contrast = contrast
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.max_val_prompts = max_val_prompts
        self.num_workers = num_workers
        self.cache = CorpusCache(cache_dir)
        self.predict_path = predict_path
        self._needs: DataNeeds | None = None
        self._corpus: tuple[str, Corpus] | None = None
        self._split_of_tree: list[frozenset[Split]] = []
        self._training: BatchLoader | None = None
        self._position: dict[str, int] | None = None

    @property
    def needs(self) -> DataNeeds:
        """What the batches are for: set by hand, or the ``data_needs`` of the trainer's LightningModule."""
        if self._needs is not None:
            return self._needs
        module = getattr(self.trainer, "lightning_module", None)
        if module is None:
            raise RuntimeError("no LightningModule is attached yet; set `datamodule.needs = DataNeeds(...)` first")
        return module.data_needs

    @needs.setter
    def needs(self, needs: DataNeeds) -> None:
        self._needs = needs

    def prepare_data(self) -> None:
        """Tokenises on one process, so that the others find it in the cache."""
        if self.paths and not getattr(self.trainer, "predicting", False):
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Reads the tokenised data and splits it. ``predict`` needs none: it reads ``predict_path`` later."""
        if stage == "predict":
            return
        if not self.paths:
            raise UserError("no data is given; name a file of conversations with --data.path FILE")
        corpus = self._load()
        splits = split_trees(corpus.tree_ids, self.val_fraction, self.test_fraction, self.seed)
        self._split_of_tree = [frozenset(name for name in SPLITS if tree in splits[name]) for tree in corpus.tree_ids]

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader:
        """Batches of the module's task. Raises :class:`UserError` where the data holds nothing to train on."""
        needs, corpus, (_, world) = self.needs, self._loaded(), self._rank_and_world()
        if needs.task == "ppo":
            threads = self._sequences("train") if needs.mix_sequences else None
            if threads is not None:
                self._require(threads, "replies to mix in")
            prompts = PromptRows(corpus.prompts, self._rows(corpus.prompts.tree, "train"), self._pad_id, threads)
            self._require(prompts, "prompts")
            mixed_rows = 0 if threads is None else len(threads)
            plan = full_batches_plan(len(prompts), self.batch_size, world, self.seed, mixed_rows)
            return self._resumed(self._loader(prompts, plan))
        rows = self._sequences("train") if needs.task == "sft" else self._ranked("train")
        self._require(rows, "replies to imitate" if needs.task == "sft" else "ranked or labelled replies")
        return self._resumed(self._loader(rows, bucketed_plan(rows.lengths, self.batch_size, world, self.seed)))

    def val_dataloader(self) -> list[BatchLoader]:
        """One loader in SFT and for the reward model; in PPO the prompts and then the sequences. Each row once."""
        return self._held_out("val") if self.val_fraction else []

    def test_dataloader(self) -> list[BatchLoader]:
        """The same over the test split."""
        if not self.test_fraction:
            raise UserError("there is no test split; give data.test_fraction a share above 0")
        return self._held_out("test")

    def predict_dataloader(self) -> BatchLoader:
        """The prompts of ``predict_path`` in their order, every one of them."""
        if self.predict_path is None:
            raise UserError("no prompts are given; name a file of prompts with --data.predict_path FILE")
        conversations = read_prompts(self.predict_path, on_bad_line=self.on_bad_line)
        prompts = PromptRows(render_prompts(conversations, self.needs), range(len(conversations)), self._pad_id)
        return self._loader(prompts, self._fixed(range(len(prompts)), f"prompts of {self.predict_path}"))

    def sample_prompts(self, count: int, split: Split = "val") -> list[Conversation]:
        """``count`` prompts of a split (or all, where it has fewer), evenly spread over it, always the same."""
        corpus = self._loaded()
        rows = self._rows(corpus.prompts.tree, split)
        spread = [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows
        return [corpus.prompts.conversations[row] for row in spread]

    def state_dict(self) -> dict[str, Any]:
        """How far training is in its epoch, for a checkpoint."""
        # Lightning keeps this too, and gives it back to the loader: but only where nothing has asked for the loader
        # before it restores its loops, and the length of a learning-rate schedule is such a question.
        return {} if self._training is None else {"training": self._training.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The training loader, or the next one, goes on where the one of the checkpoint was."""
        self._position = state.get("training")
        if self._training is not None:  # FSDP2 asks for the optimizer, and that for the loader, before it restores
            self._resumed(self._training)

    def _resumed(self, loader: BatchLoader) -> BatchLoader:
        if self._position is not None:
            loader.load_state_dict(self._position)
        self._training, self._position = loader, None
        return loader

    def _held_out(self, split: Split) -> list[BatchLoader]:
        if self.needs.task == "reward":
            ranked = self._ranked(split)
            return [self._loader(ranked, self._fixed(_longest_first(ranked.lengths), f"{split} rows"))]
        threads = self._sequences(split)
        sequences = self._loader(threads, self._fixed(_longest_first(threads.lengths), f"{split} threads"))
        if self.needs.task == "sft":
            return [sequences]
        rows = self._rows(self._loaded().prompts.tree, split)
        rows = self._capped(rows) if split == "val" else rows
        prompts = PromptRows(self._loaded().prompts, rows, self._pad_id)
        return [self._loader(prompts, self._fixed(range(len(prompts)), f"{split} prompts")), sequences]

    def _sequences(self, split: Split) -> SequenceRows:
        sequences = self._loaded().sequences
        return SequenceRows(sequences, self._rows(sequences.tree, split), self._pad_id)

    def _ranked(self, split: Split) -> RankedRows:
        ranked = self._loaded().ranked
        return RankedRows(ranked, self._rows(ranked.tree, split), self._pad_id)

    def _loader(self, dataset: Dataset[Any], plan: Plan) -> BatchLoader:
        rank, world = self._rank_and_world()
        return BatchLoader(dataset, sampler=RankSampler(dataset, plan, rank, world), num_workers=self.num_workers)

    def _fixed(self, order: Sequence[int], what: str) -> Plan:
        _, world = self._rank_and_world()
        if 0 < len(order) < world:
            # Repeated rows would count twice, and a process without a batch would keep the others waiting.
            raise UserError(f"{len(order)} {what} cannot be shared among {world} processes; use fewer devices")
        return fixed_plan(order, self.val_batch_size, world)

    # ---- rows --------------------------------------------------------------------------------------------------------

    @property
    def _pad_id(self) -> int:
        return self.needs.tokenizer.pad_id

    def _rows(self, tree_of_row: Tensor, split: Split) -> list[int]:
        return [row for row, tree in enumerate(tree_of_row.tolist()) if split in self._split_of_tree[tree]]

    def _capped(self, rows: list[int]) -> list[int]:
        """At most ``max_val_prompts`` of the prompts ``rows``, chosen by hash and left in order."""
        if self.max_val_prompts is None or len(rows) <= self.max_val_prompts:
            return rows
        corpus = self._loaded()
        nth_of_tree: dict[int, int] = {}
        priority: dict[int, float] = {}
        for row in rows:
            tree = int(corpus.prompts.tree[row])
            nth = nth_of_tree[tree] = nth_of_tree.get(tree, -1) + 1
            priority[row] = _unit_hash(self.seed, f"{corpus.tree_ids[tree]}/{nth}")
        return sorted(sorted(rows, key=priority.__getitem__)[: self.max_val_prompts])

    def _require(self, rows: Dataset[Any], what: str) -> None:
        if not len(rows):  # type: ignore[arg-type]
            raise UserError(f"{', '.join(self.paths)}: no {what} to train on; give other data with --data.path FILE")

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _loaded(self) -> Corpus:
        if self._corpus is None:
            raise RuntimeError("the data is not read yet; call `datamodule.setup()` first")
        return self._corpus[1]

    def _load(self) -> Corpus:
        """The corpus of the files and needs of now: from memory, from the cache, or made."""
        options = {
            "lang": self.lang,
            "on_bad_line": self.on_bad_line,
            "keep_synthetic": self.keep_synthetic,
            "contrast": self.contrast,
        }
        key = cache_key(self.paths, self.needs, options)
        if self._corpus is not None and self._corpus[0] == key:
            return self._corpus[1]
        first = self._rank_and_world()[0] == 0
        began = time.monotonic()
        corpus = self.cache.read(key)
        how = "read from the cache"
        if corpus is None:
            trees, report = read_trees(
                self.paths,
                lang=self.lang,
                on_bad_line=self.on_bad_line,
                keep_synthetic=self.keep_synthetic,
                progress=first,
            )
            corpus = tokenize_trees(trees, self.needs, report.summary(), contrast=self.contrast, progress=first)
            self.cache.write(key, corpus)
            how = f"tokenised in {time.monotonic() - began:.1f} s"
        self._corpus = key, corpus
        if first:
            _log.info("data: %s; %s; %s", corpus.report, _losses(corpus, self.needs), how)
        return corpus


def split_trees(
    tree_ids: Iterable[str], val_fraction: float, test_fraction: float, seed: int
) -> dict[Split, frozenset[str]]:
    """Which trees are for what. A tree's place depends on (seed, its id) alone, so it stays when others come.

    That can leave a split of a small file empty. From three trees on, a split that was asked for then gets a tree from
    the largest; fewer trees are in all splits alike, with a warning.
    """
    place = {tree: _unit_hash(seed, tree) for tree in tree_ids}
    if len(place) < 3:
        _log.warning(
            "%d conversation trees cannot be split: the data to train on is validated on too, and its numbers say "
            "nothing about new data",
            len(place),
        )
        return {name: frozenset(place) for name in SPLITS}
    splits: dict[Split, set[str]] = {name: set() for name in SPLITS}
    for tree, u in place.items():
        splits["val" if u < val_fraction else "test" if u < val_fraction + test_fraction else "train"].add(tree)
    wanted: dict[Split, bool] = {"train": True, "val": val_fraction > 0, "test": test_fraction > 0}
    for name in SPLITS:
        if wanted[name] and not splits[name]:
            largest = max(SPLITS, key=lambda other: len(splits[other]))
            moved = min(splits[largest], key=place.__getitem__)
            splits[largest].remove(moved)
            splits[name].add(moved)
    return {name: frozenset(trees) for name, trees in splits.items()}


def _unit_hash(seed: int, name: str) -> float:
    """A number in 0..1, drawn by hash."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _longest_first(lengths: list[int]) -> list[int]:
    """Similar lengths together for little padding; the longest first, so that too little memory shows at once."""
    return torch.tensor(lengths, dtype=torch.int64).sort(descending=True, stable=True).indices.tolist()


def _losses(corpus: Corpus, needs: DataNeeds) -> str:
    """What the tokenisation took away, in words."""
    dropped, cut, left_out = (corpus.facts[name] for name in ("dropped", "cut", "left_out"))
    words = f"to fit {needs.max_length:,} tokens"
    if needs.max_new_tokens:
        words += f" ({needs.max_new_tokens:,} of them kept free for the reply)"
    words += f", oldest messages dropped from {dropped:,} and words cut from {cut:,} rows"
    return words + (f"; {left_out:,} threads without a reply left out" if left_out else "")
