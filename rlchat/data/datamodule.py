"""The data module of all stages: it turns conversation files into batches.

    rlchat fit --config sft --data.path trees.jsonl.gz

The LightningModule declares what it needs (:class:`DataNeeds`), and :class:`OASST2DataModule` provides it: sequences
for SFT, ranked responses for the reward model and DPO, prompts for PPO.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from rlchat.conversation import Conversation
from rlchat.data.batches import (
    BatchLoader,
    JudgedBatch,
    JudgedRows,
    PreferenceBatch,
    PreferenceRows,
    PromptBatch,
    PromptRows,
    RankedBatch,
    RankedRows,
    RankSampler,
    SameBatchesSampler,
    SequenceBatch,
    SequenceRows,
)
from rlchat.data.cache import CorpusCache
from rlchat.data.corpus import Corpus, DataNeeds
from rlchat.data.formats import read_prompts
from rlchat.data.imitation import Imitation
from rlchat.data.loading import Reading, corpus_key, load_corpus
from rlchat.data.plans import Plan, at_least, bucketed_plan, fixed_plan, full_batches_plan
from rlchat.data.sources import DataFile, data_file, is_pipe, readable_twice
from rlchat.data.splits import Split, split_trees, unit_hash
from rlchat.data.tokenizing import Tokenization, render_prompts
from rlchat.errors import UserError

__all__ = [
    "DataNeeds",
    "JudgedBatch",
    "OASST2DataModule",
    "PreferenceBatch",
    "PromptBatch",
    "RankedBatch",
    "SequenceBatch",
    "split_trees",
]

_log = logging.getLogger("rlchat")

_TRAINED_ON = {
    "sft": "responses to imitate",
    "reward": "ranked or labelled responses",
    "dpo": "responses with different ranks",
}


class OASST2DataModule(LightningDataModule):
    """Conversations from files in OASST2's format, or any other in :mod:`rlchat.data.readers`.

    Trees are split into train, validation and test by a hash of the seed and the first user message. A tree therefore
    stays in its split in every stage and when data is added, and feedback on a held-out prompt is held out too. Only
    trees with a row for the stage count. If there are at least three, every split with a fraction above 0 gets one.
    Fewer cannot be split: all of them are then used for training and validation, with a warning.

    Args:
        path: One or more data files.
        batch_size: Rows in a training batch on each device: threads in SFT, prompts in the other stages.
        val_batch_size: The batch size in validation, test and prediction; null: same as batch_size.
        lang: The language of the OASST trees to keep; null keeps all.
        on_bad_line: Stop at an invalid line, or skip and count it.
        keep_synthetic: Whether to keep OASST messages that were written by a model.
        split_text: Whether to split text rows with chat markup (### Human:, ChatML) into turns.
        min_quality: SFT skips responses labelled lower than this, from 0 to 1; null ignores labels.
        best_rank_only: Whether SFT skips responses that are ranked below another one.
        loss_on: Whether SFT trains on all assistant messages of a thread, or only on the last.
        contrast: For a reward model or DPO on data without ranks and labels: treat the response to a turn as better
            than the response to another turn of the same conversation.
        val_fraction: The fraction of trees in the validation split; 0 turns validation off.
        test_fraction: The fraction of trees in the held-out test split, for `rlchat test`.
        seed: The seed of the split and of the training order.
        max_val_prompts: The maximum number of validation prompts to respond to, always the same ones; null: all.
        num_workers: The number of processes that prepare batches ahead of time.
        cache_dir: The folder for tokenized data; null: `rlchat` in the user's cache folder.
        predict_path: The prompts for `rlchat predict`: JSONL, or a .txt file with one prompt per line.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        lang: str | None = "en",
        on_bad_line: Literal["error", "skip"] = "error",
        keep_synthetic: bool = False,
        split_text: bool = False,
        min_quality: float | None = 0.5,
        best_rank_only: bool = True,
        loss_on: Literal["all", "last"] = "all",
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
                raise UserError(f"invalid value {count} for data.{name}: expected a positive integer")
        if num_workers < 0:
            raise UserError(f"invalid value {num_workers} for data.num_workers: expected a non-negative integer")
        if min_quality is not None and not 0 <= min_quality <= 1:
            raise UserError(f"invalid value {min_quality} for data.min_quality: expected null or a number from 0 to 1")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave nothing to train on; "
                "set both to at least 0 with a sum below 1"
            )
        self.paths = [path] if isinstance(path, str) else list(path or [])
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.reading = Reading(lang, on_bad_line, keep_synthetic, split_text)
        self.imitation = Imitation(min_quality, best_rank_only, loss_on)
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
        self._in_split: dict[Split, Tensor] = {}  # Bool [trees] each
        self._files: list[DataFile] | None = None
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._training: BatchLoader | None = None
        self._position: dict[str, int] | None = None

    @property
    def needs(self) -> DataNeeds:
        """What the batches must contain: set explicitly, or the ``data_needs`` of the trainer's LightningModule."""
        if self._needs is not None:
            return self._needs
        module = getattr(self.trainer, "lightning_module", None)
        if module is None:
            raise RuntimeError("no LightningModule is attached yet; set `datamodule.needs = DataNeeds(...)` first")
        return module.data_needs

    @needs.setter
    def needs(self, needs: DataNeeds) -> None:
        self._needs = needs

    def describe(self) -> dict[str, Any]:
        """The files, the split and how they are read, as plain values: a model file records what it was trained on.

        Paths outside the working directory are left out: model files are passed on, and such paths tell about the user.
        """
        paths = [str(path) for path in self.paths if not Path(path).is_absolute() and ".." not in Path(path).parts]
        split = {name: getattr(self, name) for name in ("seed", "val_fraction", "test_fraction")}
        return {"path": paths, **split, **asdict(self.reading)}

    def prepare_data(self) -> None:
        """Tokenizes in one process, so that the others find the result in the cache."""
        if self.paths and not getattr(self.trainer, "predicting", False):
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Reads the tokenized data and splits it. For ``predict`` it does nothing: ``predict_path`` is read later."""
        if stage == "predict":
            return
        if not self.paths:
            raise UserError("no data file is specified; pass a file of conversations with --data.path FILE")
        corpus = self._load()
        task_trees = self._task_trees(corpus)
        # Trees without a row for the stage do not count, unless no tree has one.
        used = task_trees if len(task_trees) else torch.arange(len(corpus.split_ids))
        self._in_split = split_trees(corpus.places(self.seed), used, self.val_fraction, self.test_fraction)
        if stage in (None, "fit") and self._rank_and_world()[0] == 0:
            if not self.val_fraction:
                _log.warning("validation is off, because data.val_fraction is 0: no model is selected as the best")
            elif getattr(self.trainer, "limit_val_batches", 1) == 0 and not getattr(self.trainer, "fast_dev_run", 0):
                _log.warning("validation is off, because trainer.limit_val_batches is 0: no model is selected as best")
            elif not self._in_split["val"][task_trees].any():
                _log.warning("validation is off, because the validation split has no rows for this stage")

    def _task_trees(self, corpus: Corpus) -> Tensor:
        """The tree of each row that the stage trains on, Long [rows]."""
        ranked = corpus.ranked.tree
        rows = {"sft": corpus.sequences.tree, "reward": ranked, "dpo": ranked, "ppo": corpus.prompts.tree}
        return rows[self.needs.task]

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader:
        """Batches of the module's task. Raises :class:`UserError` if the data has nothing to train on."""
        needs, corpus, (_, world) = self.needs, self._loaded(), self._rank_and_world()
        if needs.task == "ppo":
            threads = self._sequences() if needs.mix_sequences else None
            if threads is not None:
                self._require(threads, "responses to mix in")
            prompts = PromptRows(corpus.prompts, self._rows(corpus.prompts.tree, "train"), self._pad_id, threads)
            self._require(prompts, "prompts")
            mixed_rows = 0 if threads is None else len(threads)
            plan = full_batches_plan(len(prompts), self.batch_size, world, self.seed, mixed_rows)
            return self._resumed(self._loader(prompts, plan))
        rows = self._sequences() if needs.task == "sft" else self._responses(self._rows(corpus.ranked.tree, "train"))
        self._require(rows, _TRAINED_ON[needs.task])
        groups = rows.groups() if isinstance(rows, SequenceRows) else None
        return self._resumed(self._loader(rows, bucketed_plan(rows.lengths, self.batch_size, world, self.seed, groups)))

    def val_dataloader(self) -> list[BatchLoader]:
        """One loader for SFT and the reward model; DPO and PPO have another one, of sequences. Each row occurs once."""
        return self._held_out("val") if self.val_fraction else []

    def test_dataloader(self) -> list[BatchLoader]:
        """The same over the test split."""
        if not self.test_fraction:
            raise UserError("there is no test split; set data.test_fraction above 0")
        return self._held_out("test")

    def predict_dataloader(self) -> BatchLoader:
        """All prompts of ``predict_path``, in their order."""
        if self.predict_path is None:
            raise UserError("no prompts are specified; pass a file of prompts with --data.predict_path FILE")
        conversations = read_prompts(self.predict_path, on_bad_line=self.reading.on_bad_line)
        prompts = PromptRows(render_prompts(conversations, self.needs), range(len(conversations)), self._pad_id)
        return self._loader(prompts, self._fixed(len(prompts), f"prompts of {self.predict_path}"))

    def training_sample(self, rows: int) -> BatchLoader:
        """At most ``rows`` training prompts with their ranked responses, always the same, in a fixed order."""
        ranked, (_, world) = self._loaded().ranked, self._rank_and_world()
        sample = RankedRows(ranked, self._rows_in_fixed_order(ranked.tree, "train", rows), self._pad_id)
        return self._loader(sample, fixed_plan(at_least(torch.arange(len(sample)), world), self.val_batch_size, world))

    def sample_prompts(self, count: int, split: Split = "val") -> list[Conversation]:
        """``count`` evenly spaced prompts of a split, always the same; all prompts if the split has fewer."""
        corpus = self._loaded()
        rows = self._rows(corpus.prompts.tree, split)
        spread = rows[[i * len(rows) // count for i in range(count)]] if len(rows) > count else rows
        return [corpus.prompts.conversations[row] for row in spread.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """The position in the training epoch, for a checkpoint."""
        # Lightning also saves and restores the state of the loader, but only if the loader was not used before the
        # loops are restored. The length of the learning rate schedule needs the loader earlier.
        return {} if self._training is None else {"training": self._training.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the training loader, or the next one, continue at the position in the checkpoint."""
        self._position = state.get("training")
        if self._training is not None:  # FSDP2 creates the optimizer, and so the loader, before it restores
            self._resumed(self._training)

    def _resumed(self, loader: BatchLoader) -> BatchLoader:
        if self._position is not None:
            loader.load_state_dict(self._position)
        self._training, self._position = loader, None
        return loader

    def _held_out(self, split: Split) -> list[BatchLoader]:
        corpus, task = self._loaded(), self.needs.task
        loaders = []
        if task in ("reward", "dpo"):
            ranked = self._responses(self._rows_in_fixed_order(corpus.ranked.tree, split))
            loaders = [self._loader(ranked, self._fixed(len(ranked), f"{split} rows"))]
        if task == "reward":
            return loaders
        rows = self._rows_in_fixed_order(corpus.sequences.tree, split)
        threads = SequenceRows(corpus.sequences, rows, self._pad_id)
        sequences = self._loader(threads, self._fixed(len(threads), f"{split} threads"))
        if task != "ppo":
            return [*loaders, sequences]
        limit = self.max_val_prompts if split == "val" else None
        rows = self._rows_in_fixed_order(corpus.prompts.tree, split, limit)
        prompts = PromptRows(corpus.prompts, rows, self._pad_id)
        return [self._loader(prompts, self._fixed(len(prompts), f"{split} prompts")), sequences]

    def _sequences(self) -> SequenceRows:
        sequences = self._loaded().sequences
        return SequenceRows(sequences, self._rows(sequences.tree, "train"), self._pad_id)

    def _responses(self, rows: Tensor) -> RankedRows | PreferenceRows | JudgedRows:
        """The prompts ``rows`` (Long) with their responses, as the stage needs them."""
        paired = JudgedRows if self.needs.unpaired else PreferenceRows
        kind: type[RankedRows | PreferenceRows | JudgedRows] = paired if self.needs.task == "dpo" else RankedRows
        return kind(self._loaded().ranked, rows, self._pad_id)

    def _loader(self, dataset: Dataset[Any], plan: Plan) -> BatchLoader:
        rank, world = self._rank_and_world()
        kind = SameBatchesSampler if getattr(self.trainer, "overfit_batches", 0) else RankSampler
        return BatchLoader(dataset, sampler=kind(dataset, plan, rank, world), num_workers=self.num_workers)

    def _fixed(self, rows: int, what: str) -> Plan:
        _, world = self._rank_and_world()
        if 0 < rows < world:
            # Repeated rows would count twice, and processes would wait for a process that has no batch.
            raise UserError(f"{rows} {what} cannot be distributed over {world} processes; use fewer devices")
        return fixed_plan(range(rows), self.val_batch_size, world)

    # ---- rows --------------------------------------------------------------------------------------------------------

    @property
    def _pad_id(self) -> int:
        return self.needs.tokenizer.pad_id

    def _rows(self, tree_of_row: Tensor, split: Split) -> Tensor:
        """The rows of ``split``, Long [rows]."""
        return self._in_split[split][tree_of_row].nonzero().squeeze(1)

    def _rows_in_fixed_order(self, tree_of_row: Tensor, split: Split, limit: int | None = None) -> Tensor:
        """At most ``limit`` rows of ``split`` in a fixed random order, so that the first are an unbiased sample.

        The order depends on the tree of a row and its place in the tree, so most of the first rows stay first when data
        is added.
        """
        tree_ids = self._loaded().tree_ids
        rows = self._rows(tree_of_row, split)
        trees = tree_of_row[rows]
        nth_of_tree = rows - torch.searchsorted(tree_of_row, trees)  # the rows of a tree are neighbours
        numbered = zip(trees.tolist(), nth_of_tree.tolist(), strict=True)
        hashes = [unit_hash(self.seed, f"{tree_ids[tree]}/{nth}") for tree, nth in numbered]
        return rows[torch.tensor(hashes, dtype=torch.float64).argsort(stable=True)[:limit]]

    def _require(self, rows: Dataset[Any], what: str) -> None:
        if not len(rows):  # type: ignore[arg-type]
            raise UserError(f"{', '.join(self.paths)}: no {what} to train on; pass other data with --data.path FILE")

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _loaded(self) -> Corpus:
        if self._corpus is None:
            raise RuntimeError("the data has not been read; call `datamodule.setup()` first")
        return self._corpus[1]

    def _load(self) -> Corpus:
        """The corpus of the current files and needs: from memory, from the cache, or tokenized now."""
        files = self._readable_files()
        how = Tokenization(self.needs, self.imitation, self.contrast, self.seed)
        key = corpus_key(self.cache, files, self.reading, how)
        if self._corpus is None or self._corpus[0] != key:
            first = self._rank_and_world()[0] == 0
            self._corpus = key, load_corpus(self.cache, key, files, self.reading, how, first=first)
        return self._corpus[1]

    def _readable_files(self) -> list[DataFile]:
        """The files of ``path``. A pipe is copied first, because hashing and reading are two passes."""
        if self._files is None:
            self._refuse_pipes()
            self._copies = tempfile.TemporaryDirectory(prefix="rlchat-")
            self._files = [readable_twice(data_file(path), Path(self._copies.name)) for path in self.paths]
        return self._files

    def _refuse_pipes(self) -> None:
        """Raises :class:`UserError` for a pipe under several processes: each would get only a part of the data."""
        world = self._rank_and_world()[1]
        for path in self.paths if world > 1 else []:
            if is_pipe(file := data_file(path)):
                raise UserError(
                    f"{file} is a pipe, which {world} processes cannot all read; write its content to a file, or set "
                    f"--trainer.devices 1"
                )


def described_data(trainer: Trainer) -> dict[str, Any]:
    """What :meth:`OASST2DataModule.describe` tells of the data of ``trainer``, under ``data``; empty for other data."""
    data = getattr(trainer, "datamodule", None)
    return {"data": data.describe()} if isinstance(data, OASST2DataModule) and data.paths else {}
