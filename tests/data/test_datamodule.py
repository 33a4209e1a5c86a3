"""The data module: batches checked by hand, disjoint splits, a row order shared by ranks and resumes, the cache."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.data_rows import SMALL, tree_row, words
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor
from torch.utils.data import Dataset

import rlchat
from rlchat.conversation import Conversation, Message
from rlchat.data.batches import BatchLoader, RankSampler, SequenceRows
from rlchat.data.cache import CorpusCache, code_hash
from rlchat.data.corpus import Ragged, Sequences
from rlchat.data.datamodule import DataNeeds, OASST2DataModule, PromptBatch, RankedBatch, SequenceBatch, split_trees
from rlchat.data.formats import read_trees
from rlchat.data.plans import Plan, bucketed_plan, fixed_plan, full_batches_plan
from rlchat.data.sources import data_file
from rlchat.data.splits import unit_hash
from rlchat.data.tokenizing import contrasted, whole_conversations
from rlchat.demo.corpus import write_demo_corpus
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.arrays import ArrayWriter
from rlchat.utils.cache_folder import entries

OASST = Path(__file__).parent / "samples" / "oasst.messages.jsonl.gz"

PAD, USER, BOT, END = 256, 258, 259, 260
X, Y, A, B, C = (ord(letter) for letter in "xyabc")


# ---- small data files ------------------------------------------------------------------------------------------------


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"content": text} for text in texts], **more}


def oasst(text: str, replies: Sequence[tuple[str, int | None, float | None]], check: list[str] | None = None) -> Any:
    """An OASST tree of one question and its (text, rank, quality) replies."""
    prompt: dict[str, Any] = {"message_id": f"q-{text}", "text": text, "role": "prompter", "lang": "en"}
    if check:
        prompt["check"] = {"any_of": check}
    prompt["replies"] = [
        {
            "message_id": f"{text}/{i}",
            "text": reply,
            "role": "assistant",
            "lang": "en",
            "rank": rank,
            "labels": None if quality is None else {"quality": {"value": quality, "count": 1}},
            "replies": [],
        }
        for i, (reply, rank, quality) in enumerate(replies)
    ]
    return {"message_tree_id": f"t-{text}", "tree_state": "ready_for_export", "prompt": prompt}


def many_trees(path: Path, count: int) -> str:
    return write(path, [oasst(f"q{i}", [("a" * (1 + i % 7), 0, 1.0), ("b", 1, 0.0)]) for i in range(count)])


def module(path: str | list[str] | None, needs: DataNeeds, cache: Path, **options: Any) -> OASST2DataModule:
    data = OASST2DataModule(path, cache_dir=str(cache), **options)
    data.needs = needs
    return data


@pytest.fixture
def sft(byte_tokenizer: ChatTokenizer) -> DataNeeds:
    return DataNeeds("sft", byte_tokenizer, max_length=64)


@pytest.fixture
def reward(byte_tokenizer: ChatTokenizer) -> DataNeeds:
    return DataNeeds("reward", byte_tokenizer, max_length=64)


@pytest.fixture
def ppo(byte_tokenizer: ChatTokenizer) -> DataNeeds:
    return DataNeeds("ppo", byte_tokenizer, max_length=64, max_new_tokens=16)


def only(batches: Iterable[Any]) -> Any:
    (batch,) = batches
    return batch


# ---- batches by hand -------------------------------------------------------------------------------------------------


def test_sequences_are_right_padded_and_the_loss_is_on_the_response_only(tmp_path: Path, sft: DataNeeds) -> None:
    path = write(tmp_path / "d.jsonl", [chat("x", "ab"), chat("xy", "abc", "y", "c")])
    data = module(path, sft, tmp_path)
    data.setup()
    batch = only(data.val_dataloader()[0])  # two trees: not split
    assert isinstance(batch, SequenceBatch)
    first = [USER, X, Y, END, BOT, A, B, C, END, USER, Y, END, BOT, C, END]
    second = [USER, X, END, BOT, A, B, END]
    assert batch.ids.tolist() == [first, second + [PAD] * 8]
    assert batch.attention_mask.tolist() == [[True] * 15, [True] * 7 + [False] * 8]
    learnt = [[i for i, on in enumerate(row) if on] for row in batch.loss_mask.tolist()]
    assert learnt == [[5, 6, 7, 8, 13, 14], [4, 5, 6]]
    assert (batch.ids.dtype, batch.attention_mask.dtype, batch.loss_mask.dtype) == (torch.int64, torch.bool, torch.bool)


def test_ranked_batches_have_group_rank_quality_and_check(tmp_path: Path, reward: DataNeeds) -> None:
    rows = [
        oasst("x", [("a", 1, 0.25), ("bb", 0, None)], check=["a"]),
        oasst("y", [("c", None, None)]),  # neither ranked nor labelled: cannot be trained on
        oasst("xx", [("a", 0, None)]),  # a single rank forms no pair
        {"text": "abc", "quality": 0.5},  # labelled, without a prompt
    ]
    data = module(write(tmp_path / "d.jsonl", rows), reward, tmp_path, val_fraction=0.0, test_fraction=0.0)
    data.setup()
    assert data.val_dataloader() == []
    batch = only(data.train_dataloader())
    assert isinstance(batch, RankedBatch)
    assert batch.attention_mask.equal(batch.ids != PAD)
    replies = {
        tuple(ids[ids != PAD].tolist()): (int(group), int(rank), float(quality), int(right))
        for ids, _, group, rank, quality, right in zip(*batch, strict=True)
    }
    assert set(batch.group.tolist()) == {0, 1}
    assert replies[USER, X, END, BOT, A, END][1:] == (1, 0.25, 1)
    group, rank, quality, right = replies[USER, X, END, BOT, B, B, END]
    assert (rank, right) == (0, 0)
    assert quality != quality  # nan
    assert group == replies[USER, X, END, BOT, A, END][0]
    assert replies[BOT, A, B, C, END] == (1 - group, -1, 0.5, -1)
    assert len(replies) == 3


def test_prompts_are_left_padded_and_leave_room_for_the_response(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    needs = DataNeeds("ppo", byte_tokenizer, max_length=30, max_new_tokens=20)
    path = write(tmp_path / "d.jsonl", [chat("x", "a"), chat("0123456789", "a")])
    data = module(path, needs, tmp_path)
    data.setup()
    batch = only(data.val_dataloader()[0])
    # ten tokens: the marker, the last seven digits, the end, and the marker that opens the response
    long = [USER, *b"3456789", END, BOT]
    rows = zip(batch.ids.tolist(), batch.attention_mask.tolist(), batch.conversations, strict=True)
    by_prompt = {conversation.messages[-1].text: (ids, mask) for ids, mask, conversation in rows}
    assert by_prompt == {
        "x": ([PAD] * 6 + [USER, X, END, BOT], [False] * 6 + [True] * 4),
        "0123456789": (long, [True] * 10),
    }
    assert [c.references[0].text for c in batch.conversations] == ["a", "a"]
    assert batch.sequences is None
    assert len(only(data.val_dataloader()[1]).ids) == 2


def test_ppo_batches_contain_sequences_if_the_module_mixes_them_in(tmp_path: Path, byte_tokenizer: Any) -> None:
    needs = DataNeeds("ppo", byte_tokenizer, 64, 16, mix_sequences=True)
    data = module(many_trees(tmp_path / "d.jsonl", 40), needs, tmp_path, batch_size=4)
    data.setup()
    batches = list(data.train_dataloader())
    assert all(len(batch.sequences.ids) == 4 == len(batch.ids) for batch in batches)
    seen = {tuple(row.tolist()) for batch in batches for row in batch.sequences.ids}
    assert len(seen) == 4 * len(batches)  # drawn without replacement
    # other splits are not mixed
    assert data.val_dataloader()[0].dataset[[0]].sequences is None
    prompts_alone = module(write(tmp_path / "p.jsonl", [{"prompt": f"q{n}"} for n in range(20)]), needs, tmp_path)
    prompts_alone.setup()
    with pytest.raises(UserError, match="no responses to mix in to train on"):
        prompts_alone.train_dataloader()


def test_lightning_can_move_and_convert_a_prompt_batch(tmp_path: Path, ppo: DataNeeds) -> None:
    data = module(write(tmp_path / "d.jsonl", [chat("x", "a")]), ppo, tmp_path)
    data.setup()
    batch = only(data.val_dataloader()[0])
    cast = HalfPrecision("bf16-true").convert_input(batch)
    assert cast.conversations == batch.conversations
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(moved, PromptBatch)
    assert moved.ids.device.type == "meta"
    assert moved.conversations is batch.conversations
    copied = pickle.loads(pickle.dumps(batch))
    assert copied.ids.equal(batch.ids)
    assert copied.conversations == batch.conversations


# ---- splits ----------------------------------------------------------------------------------------------------------

names = st.lists(st.text(max_size=8), unique=True, min_size=3, max_size=60)


def split_of(trees: Sequence[str], val: float, test: float, seed: int) -> dict[Any, set[str]]:
    """The names in each split."""
    places = torch.tensor([unit_hash(seed, name) for name in trees], dtype=torch.float64)
    splits = split_trees(places, torch.arange(len(trees)), val, test)
    return {split: {trees[i] for i in of_split.nonzero().squeeze(1)} for split, of_split in splits.items()}


@given(names, st.floats(0, 0.49), st.floats(0, 0.49), st.integers(0, 5))
def test_a_tree_is_in_exactly_one_split_and_no_requested_split_is_empty(
    trees: list[str], val: float, test: float, seed: int
) -> None:
    splits = split_of(trees, val, test, seed)
    assert sorted(tree for split in splits.values() for tree in split) == sorted(trees)
    assert splits["train"]
    assert bool(splits["val"]) == (val > 0)
    assert bool(splits["test"]) == (test > 0)


def test_the_split_is_stable_when_data_is_added_and_has_the_requested_size() -> None:
    trees = [f"tree-{i}" for i in range(4000)]
    few, many = split_of(trees[:2000], 0.1, 0.05, 0), split_of(trees[::-1], 0.1, 0.05, 0)
    for name, split in few.items():
        assert split == many[name] & set(trees[:2000])
    assert 340 < len(many["val"]) < 460  # expected 400 with a standard deviation of 19
    assert 150 < len(many["test"]) < 250
    assert split_of(trees, 0.1, 0.05, seed=1)["val"] != many["val"]


@pytest.mark.parametrize("task", ["sft", "reward", "ppo"])
def test_no_held_out_row_comes_from_a_training_tree(tmp_path: Path, byte_tokenizer: Any, task: Any) -> None:
    path = many_trees(tmp_path / "d.jsonl", 60)
    needs = DataNeeds(task, byte_tokenizer, 64, 16 if task == "ppo" else 0)
    data = module(path, needs, tmp_path, batch_size=1, val_fraction=0.2, test_fraction=0.2)
    data.setup()

    def questions(loader: Any) -> set[tuple[int, ...]]:
        rows = [ids[mask].tolist() for batch in loader for ids, mask in zip(batch.ids, batch.attention_mask)]  # noqa: B905
        return {tuple(row[: row.index(END)]) for row in rows}

    train = questions(data.train_dataloader())
    val, test = questions(data.val_dataloader()[0]), questions(data.test_dataloader()[0])
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(train | val | test) == 60


def test_a_single_tree_is_used_for_validation_with_a_warning(tmp_path: Path, sft: DataNeeds, caplog: Any) -> None:
    data = module(write(tmp_path / "d.jsonl", [chat("x", "a")]), sft, tmp_path)
    data.setup()
    assert "cannot be split" in caplog.text
    assert only(data.train_dataloader()).ids.equal(only(data.val_dataloader()[0]).ids)


@pytest.mark.parametrize("trees", [1, 2])
def test_without_fractions_few_trees_are_training_data_without_a_warning(
    trees: int, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"tree {i}" for i in range(trees)]
    assert split_of(ids, 0, 0, 0) == {"train": set(ids), "val": set(), "test": set()}
    assert not caplog.text


def test_validation_prompts_have_a_fixed_random_order_and_the_limit_keeps_the_first(
    tmp_path: Path, ppo: DataNeeds
) -> None:
    def val_prompts(trees: int, cap: int | None) -> list[str]:
        path = many_trees(tmp_path / "d.jsonl", trees)
        data = module(path, ppo, tmp_path, val_fraction=0.5, max_val_prompts=cap)
        data.setup()
        return [c.messages[0].text for batch in data.val_dataloader()[0] for c in batch.conversations]

    everything, capped = val_prompts(60, None), val_prompts(60, 7)
    assert len(capped) == 7
    assert [p for p in everything if p in capped] == capped
    assert capped == everything[:7]
    assert everything != sorted(everything, key=lambda text: int(text[1:]))  # not the order of the file
    more = val_prompts(80, 7)
    assert len(set(more) & set(capped)) >= 3  # most of them stay when a third more data is added


# ---- the order of an epoch -------------------------------------------------------------------------------------------


class Rows(Dataset[list[Any]]):
    """A dataset whose batches are the lists of row numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> list[Any]:
        return list(index)


def of_rank(plan: Plan, count: int, rank: int, world: int, epoch: int) -> list[list[Any]]:
    sampler = RankSampler(Rows(count), plan, rank, world)
    sampler.set_epoch(epoch)
    batches = [list(batch) for batch in sampler]
    assert len(batches) == len(sampler)
    return batches


def merged(parts: Sequence[list[list[Any]]]) -> list[list[Any]]:
    """The global batches, merged from the parts of the ranks: row i comes from rank i % world."""
    assert len({len(part) for part in parts}) == 1, "a rank takes fewer steps than another and the others wait forever"
    batches = []
    for at_this_step in zip(*parts, strict=True):
        count = sum(map(len, at_this_step))
        batches.append([at_this_step[i % len(parts)][i // len(parts)] for i in range(count)])
    return batches


def plans(kind: str, lengths: list[int], batch_size: int, world: int) -> Plan:
    if kind == "bucketed":
        return bucketed_plan(lengths, batch_size, world, seed=3)
    if kind == "grouped":
        return bucketed_plan(lengths, batch_size, world, seed=3, groups=[row // 3 for row in range(len(lengths))])
    if kind == "full":
        return full_batches_plan(len(lengths), batch_size, world, seed=3)
    if kind == "mixed":
        return full_batches_plan(len(lengths), batch_size, world, seed=3, mixed_rows=5)
    return fixed_plan(range(len(lengths)), batch_size, world)


@pytest.mark.parametrize("kind", ["bucketed", "grouped", "full", "mixed", "fixed"])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 100, 130])
def test_two_ranks_see_the_same_rows_as_one_process_with_twice_the_batch_size(kind: str, count: int) -> None:
    lengths = [(i * 37) % 11 for i in range(count)]
    for epoch in (0, 1):
        one = of_rank(plans(kind, lengths, 8, 1), count, 0, 1, epoch)
        two = merged([of_rank(plans(kind, lengths, 4, 2), count, rank, 2, epoch) for rank in (0, 1)])
        if kind in ("bucketed", "grouped", "fixed") and count % 8 == 1:
            # A single row cannot be shared by two ranks: it joins the previous batch in its window.
            assert sorted(row for b in one for row in b) == sorted(row for b in two for row in b)
        else:
            assert one == two


@given(
    st.integers(1, 70), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["bucketed", "grouped", "full", "fixed"])
)
@settings(max_examples=150)
def test_all_ranks_take_the_same_number_of_steps_and_rows_occur_once(
    count: int, size: int, world: int, kind: str
) -> None:
    if kind == "fixed" and count < world:
        return  # the data module does not allow this
    lengths = [(i * 37) % 11 for i in range(count)]
    parts = [of_rank(plans(kind, lengths, size, world), count, rank, world, 0) for rank in range(world)]
    assert all(batch for part in parts for batch in part)
    batches = merged(parts)
    rows = [row for batch in batches for row in batch]
    if kind == "full":
        assert {len(batch) for batch in batches} == {size * world}
        assert len(set(rows)) == min(count, len(rows))
    elif count >= world:
        assert sorted(rows) == list(range(count))
    else:
        assert set(rows) == set(range(count))


def test_the_order_depends_only_on_epoch_and_seed() -> None:
    lengths = [1] * 64
    plan = bucketed_plan(lengths, 4, 1, seed=0)
    first, second = list(plan(0)), list(plan(1))
    assert first == list(plan(0))
    assert first != second
    assert first != list(bucketed_plan(lengths, 4, 1, seed=1)(0))
    torch.manual_seed(1)
    assert second == list(bucketed_plan(lengths, 4, 1, seed=0)(1))


def test_batches_have_rows_of_similar_length_and_are_shuffled() -> None:
    lengths = torch.randint(1, 500, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = bucketed_plan(lengths, 8, 1, seed=0)(0)
    spread = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches]
    assert sum(spread) / len(spread) < 50  # without sorting it is about 390
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_rows_of_a_group_stay_together_in_order() -> None:
    lengths = torch.randint(1, 500, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = bucketed_plan(lengths, 8, 1, seed=0, groups=[row // 4 for row in range(640)])(0)
    for batch in batches:
        assert [row // 4 for row in batch] == [batch[0] // 4] * 4 + [batch[4] // 4] * 4
        assert [row % 4 for row in batch] == [0, 1, 2, 3] * 2
    longest = [[max(lengths[row] for row in half) for half in (batch[:4], batch[4:])] for batch in batches]
    assert sum(abs(one - other) for one, other in longest) / len(longest) < 20  # without sorting it is about 90


def test_threads_that_begin_alike_are_a_group() -> None:
    """Trees 0 0 0 0 0 0 1 1: the third row is too different, and a group has at most four rows."""
    rows = [
        [1, 2, 3, 4],
        [1, 2, 3, 5],
        [1, 7, 7, 7],
        *[[1, 7, 7, 8, i] for i in range(3)],
        [1, 7, 7, 8],
        [1, 7, 7, 8, 9],
    ]
    flat = torch.tensor([token for row in rows for token in row])
    offsets = torch.tensor([0, *itertools.accumulate(map(len, rows))])
    ids = Ragged(flat, offsets)
    sequences = Sequences(ids, Ragged(flat > 0, offsets), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]))
    assert SequenceRows(sequences, range(8), 0).groups().tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert SequenceRows(sequences, [0, 2, 3, 7], 0).groups().tolist() == [0, 1, 1, 2]
    assert SequenceRows(sequences, [], 0).groups().tolist() == []


def test_all_mixed_in_rows_are_used() -> None:
    (batch,) = full_batches_plan(10, 10, 1, seed=0, mixed_rows=5)(0)
    assert sorted(prompt for prompt, _ in batch) == list(range(10))  # type: ignore[misc]
    assert sorted(thread for _, thread in batch) == sorted([*range(5), *range(5)])  # type: ignore[misc]


def test_ranks_of_the_data_module_share_the_rows_of_an_epoch(tmp_path: Path, sft: DataNeeds) -> None:
    path = many_trees(tmp_path / "d.jsonl", 50)

    def batches(batch_size: int, rank: int, world: int) -> list[list[list[int]]]:
        data = module(path, sft, tmp_path, batch_size=batch_size)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
        return [[ids[mask].tolist() for ids, mask in zip(b.ids, b.attention_mask, strict=True)] for b in loader]

    assert merged([batches(3, 0, 2), batches(3, 1, 2)]) == batches(6, 0, 1)


def test_too_few_held_out_rows_for_the_devices_are_an_error(tmp_path: Path, sft: DataNeeds) -> None:
    data = module(many_trees(tmp_path / "d.jsonl", 3), sft, tmp_path)
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)  # type: ignore[assignment]
    data.setup()
    with pytest.raises(UserError, match="1 val threads cannot be distributed over 3 processes"):
        data.val_dataloader()


# ---- resuming in the middle of an epoch ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_after_the_batches_that_were_yielded(num_workers: int) -> None:
    def loader() -> BatchLoader:
        dataset = Rows(23)
        sampler = RankSampler(dataset, bucketed_plan(list(range(23)), 4, 1, seed=0), 0, 1)
        return BatchLoader(dataset, sampler=sampler, num_workers=num_workers)

    whole = loader()
    whole.sampler.set_epoch(5)  # type: ignore[attr-defined]
    expected = list(whole)
    assert len(expected) == len(whole) == 6
    assert list(whole) == expected  # the next pass is complete

    interrupted = loader()
    interrupted.sampler.set_epoch(5)  # type: ignore[attr-defined]
    iterator = iter(interrupted)
    assert [next(iterator), next(iterator)] == expected[:2]
    state = interrupted.state_dict()  # workers have prefetched more than two batches by now
    assert state == {"epoch": 5, "batches": 2, "batches_per_epoch": 6}
    del iterator

    resumed = loader()
    resumed.load_state_dict(state)
    assert len(resumed) == 6
    assert list(resumed) == expected[2:]
    assert resumed.state_dict()["batches"] == 6
    assert list(resumed) == expected

    later = loader()
    later.load_state_dict(state)
    later.sampler.set_epoch(6)  # type: ignore[attr-defined]
    assert len(list(later)) == 6  # the position belonged to epoch 5


class Recorder(LightningModule):
    """Records the rows of each batch."""

    def __init__(self, needs: DataNeeds) -> None:
        super().__init__()
        self.data_needs = needs
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[list[int]]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch.ids.tolist()))
        return self.weight * 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/x", torch.tensor(1.0), batch_size=len(batch.ids))

    def predict_step(self, batch: Any, batch_idx: int) -> list[str]:
        return [conversation.messages[-1].text for conversation in batch.conversations]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAlways(Callback):
    """Saves a checkpoint in every hook that allows it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, list[tuple[str, int, Path]]()

    def _save(self, when: str, trainer: Trainer, model: Any) -> None:
        if trainer.sanity_checking:
            return
        path = self.folder / f"{len(self.saved)}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((when, len(model.seen), path))

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        self._save("batch", trainer, model)

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        self._save("validation", trainer, model)

    def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
        self._save("epoch", trainer, model)


def fit(data: OASST2DataModule, model: Recorder, *callbacks: Callback, ckpt: Path | None = None, **options: Any) -> Any:
    settings = {"max_epochs": 3, "val_check_interval": 3, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer


@pytest.mark.parametrize("task", ["sft", "ppo"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_sees_the_same_batches_as_an_uninterrupted_one(
    tmp_path: Path, byte_tokenizer: Any, task: Any
) -> None:
    path = many_trees(tmp_path / "d.jsonl", 30)
    needs = DataNeeds(task, byte_tokenizer, 64, 16 if task == "ppo" else 0)

    def data() -> OASST2DataModule:
        return module(path, needs, tmp_path, batch_size=6, val_fraction=0.2, test_fraction=0.0)

    whole, saver = Recorder(needs), SaveAlways(tmp_path)
    fit(data(), whole, saver)
    per_epoch = len(whole.seen) // 3
    assert per_epoch >= 3
    assert {when for when, *_ in saver.saved} == {"batch", "validation", "epoch"}
    for when, count, checkpoint in saver.saved:
        resumed = Recorder(needs)
        fit(data(), resumed, ckpt=checkpoint)
        assert resumed.seen == whole.seen[count:], f"saved at {when} end after {count} batches"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_store_the_data_position_as_plain_values(tmp_path: Path, sft: DataNeeds) -> None:
    path = many_trees(tmp_path / "d.jsonl", 10)
    trainer = fit(module(path, sft, tmp_path, batch_size=4), Recorder(sft), max_epochs=1, val_check_interval=1.0)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert "datamodule_hyper_parameters" not in state
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader == {"epoch": 0, "batches": 2, "batches_per_epoch": 2}


# ---- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_prediction_keeps_all_prompts_in_the_order_of_the_file(tmp_path: Path, ppo: DataNeeds) -> None:
    questions = [f"question {i}" for i in (3, 1, 2, 1, 4)]
    (tmp_path / "p.txt").write_text("\n".join(questions) + "\n\n", encoding="utf-8")
    write(tmp_path / "p.jsonl", [{"prompt": question} for question in questions])
    for name in ("p.txt", "p.jsonl"):
        data = OASST2DataModule(val_batch_size=2, predict_path=str(tmp_path / name), cache_dir=str(tmp_path))
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        predictions = trainer.predict(Recorder(ppo), datamodule=data)
        assert predictions == [questions[:2], questions[2:4], questions[4:]]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", ["sft", "ppo"])
def test_overfit_batches_sees_the_same_rows_in_every_epoch(tmp_path: Path, byte_tokenizer: Any, task: Any) -> None:
    needs = DataNeeds(task, byte_tokenizer, 64, 16 if task == "ppo" else 0, mix_sequences=task == "ppo")
    data, model = module(many_trees(tmp_path / "d.jsonl", 20), needs, tmp_path), Recorder(needs)
    fit(data, model, overfit_batches=2, max_epochs=2, val_check_interval=1.0)
    assert len(model.seen) == 4
    assert [ids for _, ids in model.seen[:2]] == [ids for _, ids in model.seen[2:]]
    assert [len(ids) for _, ids in model.seen] == [data.batch_size] * 4


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="rlchat")
    return caplog


def was_cached(data: OASST2DataModule, heard: pytest.LogCaptureFixture) -> bool:
    """Whether the setup of ``data`` used the cache, according to its log, which must report it exactly once."""
    heard.clear()
    data.prepare_data()
    data.setup("fit")
    data.setup("validate")
    (line,) = [record.getMessage() for record in heard.records if record.levelno == logging.INFO]
    assert ("tokenized in" in line) != ("read from the cache" in line)
    return "read from the cache" in line


def contents(data: OASST2DataModule) -> list[Any]:
    batch = next(iter(data.train_dataloader()))
    return [value.tolist() if isinstance(value, Tensor) else value for value in batch]


@pytest.mark.parametrize("task", ["sft", "reward", "ppo"])
def test_cached_data_equals_freshly_tokenized_data(tmp_path: Path, byte_tokenizer: Any, heard: Any, task: Any) -> None:
    path = many_trees(tmp_path / "d.jsonl", 20)
    needs = DataNeeds(task, byte_tokenizer, 64, 8)
    first, second = module(path, needs, tmp_path / "c"), module(path, needs, tmp_path / "c")
    assert not was_cached(first, heard)
    assert was_cached(second, heard)
    fresh, stored = contents(first), contents(second)
    if task == "reward":
        assert fresh.pop(4) == stored.pop(4)  # quality, never NaN here
    assert fresh == stored


def test_a_full_cache_keeps_the_data_that_was_used_last(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_trees(tmp_path / "d.jsonl", 10)

    def cached(length: int) -> bool:
        return was_cached(module(path, DataNeeds("sft", byte_tokenizer, length), tmp_path / "c"), heard)

    assert not cached(64)
    assert not cached(63)
    old, new = (entry for entry in entries(tmp_path / "c") if entry.what == "tokenized data")
    for age, entry in enumerate((new, old)):
        os.utime(entry.path, (1e9 + age, 1e9 + age))  # `old` is now the one that was used last
    assert cached(63)  # which changes that again
    monkeypatch.setattr("rlchat.utils.cache_folder.LIMIT", 2 * new.size + old.size // 2)
    heard.clear()
    module(path, DataNeeds("sft", byte_tokenizer, 62), tmp_path / "c").setup("fit")
    assert "removed the least recently used data (1 entries" in heard.text
    assert not old.path.exists()
    assert new.path.exists()


def test_the_cache_key_depends_on_everything_that_changes_the_data(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, tokenizer: ChatTokenizer, heard: pytest.LogCaptureFixture
) -> None:
    path = many_trees(tmp_path / "d.jsonl", 10)

    def cached(task: Any = "sft", encoding: ChatTokenizer = byte_tokenizer, length: int = 64, **options: Any) -> bool:
        return was_cached(module(path, DataNeeds(task, encoding, length), tmp_path / "c", **options), heard)

    assert not cached()
    assert cached()
    assert cached(batch_size=3, seed=4, val_fraction=0.3)  # these options are applied after tokenization
    assert not cached(encoding=tokenizer)
    assert not cached(length=63)
    assert not cached(task="reward")
    assert not cached(lang=None)
    assert not cached(on_bad_line="skip")
    assert not cached(keep_synthetic=True)
    many_trees(tmp_path / "d.jsonl", 11)
    assert not cached()
    many_trees(tmp_path / "d.jsonl", 10)
    assert cached()


def test_the_cache_key_depends_on_the_code(tmp_path: Path, sft: DataNeeds, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many_trees(tmp_path / "d.jsonl", 10)
    copy = tmp_path / "rlchat"
    shutil.copytree(Path(rlchat.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rlchat, "__file__", str(copy / "__init__.py"))

    def key() -> str:
        code_hash.cache_clear()
        return CorpusCache(str(tmp_path / "c")).key([data_file(path)], sft, {})

    try:
        keys = [key(), key()]
        for change in (copy / "data" / "readers" / "a_new_format.py", copy / "tokenizer" / "chat_tokenizer.py"):
            with change.open("a") as file:
                file.write("# changed\n")
            keys.append(key())
        (copy / "chat" / "commands.py").write_text("# this decides nothing about data")
        keys.append(key())
    finally:
        monkeypatch.undo()
        code_hash.cache_clear()
    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "missing", "no manifest", "other manifest", "other arrays"])
def test_a_damaged_cache_is_created_again(tmp_path: Path, sft: DataNeeds, heard: Any, damage: str) -> None:
    path = many_trees(tmp_path / "d.jsonl", 10)
    whole = module(path, sft, tmp_path / "c")
    assert not was_cached(whole, heard)
    expected = contents(whole)
    (folder,) = (entry.path for entry in entries(tmp_path / "c") if entry.what == "tokenized data")
    ids, manifest = folder / "sequences.ids.flat.bin", folder / "about.json"
    content = bytearray(ids.read_bytes())
    content[content.index(bytes(torch.tensor([USER], dtype=torch.int32).numpy()))] ^= 255
    if damage == "other arrays":
        with ArrayWriter(folder) as writer:
            writer.finish({"facts": {}})
    elif damage == "missing":
        ids.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "other manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b"int64", b"int32"))
    else:
        # Replaced, because this process has mapped the file.
        ids.unlink()
        ids.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    again = module(path, sft, tmp_path / "c")
    assert not was_cached(again, heard)
    assert "is damaged" in heard.text
    assert contents(again) == expected
    assert was_cached(module(path, sft, tmp_path / "c"), heard)


@pytest.mark.parametrize("ends", ["error", "full"])
def test_an_interrupted_start_leaves_no_data_behind(
    tmp_path: Path, sft: DataNeeds, heard: Any, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    path = many_trees(tmp_path / "d.jsonl", 10)
    append, appended = ArrayWriter.append, itertools.count()

    def interrupted(self: ArrayWriter, *arguments: Any) -> None:
        if next(appended) == 5:
            raise KeyboardInterrupt if ends == "error" else OSError(28, "No space left on device")
        append(self, *arguments)

    monkeypatch.setattr(ArrayWriter, "append", interrupted)
    data = module(path, sft, tmp_path / "c")
    if ends == "error":
        with pytest.raises(KeyboardInterrupt):
            data.setup()
    else:
        data.setup()  # with temporary files instead
        assert "could not cache the tokenized data in" in heard.text
        assert "No space left on device" in heard.text
        assert len(contents(data)[0]) == 7
    assert not list((tmp_path / "c").glob("*"))


def test_a_cache_that_cannot_be_written_only_warns(tmp_path: Path, sft: DataNeeds, heard: Any) -> None:
    path = many_trees(tmp_path / "d.jsonl", 10)
    (tmp_path / "c").write_text("a file where the folder should be")
    data = module(path, sft, tmp_path / "c")
    assert not was_cached(data, heard)  # tokenized once, not in both prepare_data and setup
    assert "could not cache the tokenized data" in heard.text
    assert len(contents(data)[0]) == 7  # of ten trees, three are held out


def test_the_cache_is_in_the_users_cache_folder(
    tmp_path: Path, sft: DataNeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = OASST2DataModule(many_trees(tmp_path / "d.jsonl", 10))
    data.needs = sft
    data.prepare_data()
    assert "tokenized data" in [entry.what for entry in entries(tmp_path / "xdg" / "rlchat")]


# ---- messages and errors ---------------------------------------------------------------------------------------------


def test_the_log_line_reports_what_was_read_and_what_was_dropped(
    tmp_path: Path, heard: Any, byte_tokenizer: Any
) -> None:
    rows = [chat("x", "a"), chat("x" * 9, "a", "y", "b"), chat("y" * 30, "b")]
    data = module(write(tmp_path / "d.jsonl", rows), DataNeeds("sft", byte_tokenizer, 16), tmp_path)
    data.setup()
    line = next(record.getMessage() for record in heard.records if record.levelno == logging.INFO)
    assert "3 trees, 3 threads, 4 prompts" in line
    assert "to fit 16 tokens, oldest messages dropped from 1 rows and text cut from 1" in line


def test_truncated_ranked_responses_end_with_the_end_marker_and_are_counted(
    tmp_path: Path, heard: Any, byte_tokenizer: ChatTokenizer
) -> None:
    """A pair in 7 tokens: u:ab with a:c fits (7 ids); with a:cdef, the question is cut to 3 ids, the response to 4."""
    rows = [{"prompt": "ab", "chosen": "c", "rejected": "cdef"}]
    data = module(write(tmp_path / "d.jsonl", rows), DataNeeds("reward", byte_tokenizer, 7), tmp_path)
    data.setup()
    user, assistant, end = 258, 259, 260
    ranked = data._loaded().ranked
    assert ranked.ids[0].tolist() == [user, *b"ab", end, assistant, *b"c", end]
    assert ranked.ids[1].tolist() == [user, *b"b", end, assistant, *b"cd", end]
    line = next(record.getMessage() for record in heard.records if record.levelno == logging.INFO)
    assert "text cut from 1 (1 of 2 responses cut and closed with the end marker)" in line


def test_errors_name_the_fix(tmp_path: Path, sft: DataNeeds, reward: DataNeeds, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"--data\.path FILE"):
        module(None, sft, tmp_path).setup("fit")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        module(str(tmp_path / "missing.jsonl"), sft, tmp_path).setup()
    with pytest.raises(UserError, match="predict_path"):
        module(None, sft, tmp_path).predict_dataloader()
    with pytest.raises(UserError, match=r"invalid value 0 for data\.batch_size"):
        OASST2DataModule(batch_size=0)
    with pytest.raises(UserError, match="leave nothing to train on"):
        OASST2DataModule(val_fraction=0.5, test_fraction=0.5)
    data = module(write(tmp_path / "d.jsonl", [chat("x", "a")] * 3), reward, tmp_path, test_fraction=0.0)
    data.setup()
    with pytest.raises(UserError, match="no ranked or labelled responses to train on"):
        data.train_dataloader()
    with pytest.raises(UserError, match="test_fraction"):
        data.test_dataloader()
    cramped = DataNeeds("ppo", byte_tokenizer, max_length=20, max_new_tokens=16)
    with pytest.raises(UserError, match="leaves 4 tokens for a prompt"):
        module(write(tmp_path / "e.jsonl", [chat("x", "a")]), cramped, tmp_path).setup()


# ---- sample data -----------------------------------------------------------------------------------------------------


def test_rows_of_an_oasst_sample(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    def count(needs: DataNeeds) -> dict[str, int]:
        data = module(str(OASST), needs, tmp_path, val_fraction=0.1, test_fraction=0.1, val_batch_size=16)
        data.setup()
        train = data.train_dataloader()
        held_out = [*data.val_dataloader(), *data.test_dataloader()]
        for batch in [next(iter(train)), *(next(iter(loader)) for loader in held_out)]:
            assert batch.ids.shape[1] <= needs.prompt_length if isinstance(batch, PromptBatch) else needs.max_length
            assert batch.attention_mask.equal(batch.ids != tokenizer.pad_id)
            if isinstance(batch, SequenceBatch):
                assert batch.loss_mask.any(1).all()
        rows: dict[str, int] = {}
        for loader in [train, *held_out]:
            kind = type(loader.dataset).__name__
            rows[kind] = rows.get(kind, 0) + len(loader.dataset)  # type: ignore[arg-type]
        return rows

    trees, report = read_trees([OASST], progress=False)
    assert (report.trees, len(trees)) == (43, 43)
    # Of 84 threads, 42 end with a response that is ranked below another and are not imitated.
    assert report.threads == 84
    assert count(DataNeeds("sft", tokenizer, 512)) == {"SequenceRows": 42}
    assert count(DataNeeds("ppo", tokenizer, 512, 128))["PromptRows"] == report.prompts
    judged = [
        prompt
        for tree in trees
        for prompt in tree.prompts
        if any(reply.quality is not None for reply in prompt.references)
        or len({reply.rank for reply in prompt.references} - {None}) >= 2
    ]
    assert count(DataNeeds("reward", tokenizer, 512)) == {"RankedRows": len(judged)}


def test_contrast_pairs_a_response_with_the_response_to_another_turn() -> None:
    def prompt(*texts: str, rank: int | None = None) -> Conversation:
        *said, reply = texts
        messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))
        return Conversation(messages, references=(Message("assistant", reply, rank=rank),))

    turns = [prompt("a", "A"), prompt("a", "A", "b", "B"), prompt("c", "C", rank=0), prompt("d", "A")]
    first, second, judged, fourth = contrasted(turns)
    assert [(r.text, r.rank) for r in first.references] == [("A", 0), ("B", 1)]
    assert [(r.text, r.rank) for r in second.references] == [("B", 0), ("C", 1)]  # of A, C, A the one at index 1
    assert judged == turns[2]
    assert [(r.text, r.rank) for r in fourth.references] == [("A", 0), ("C", 1)]  # of B, C the one at index 3 mod 2
    assert contrasted([prompt("a", "A")]) == [prompt("a", "A")]  # nothing to contrast with


# ---- several turns ---------------------------------------------------------------------------------------------------


def test_whole_conversations_are_the_paths_through_a_tree(tmp_path: Path) -> None:
    """q1 has two responses and three continuations: q2 and q3 after a1, and q4 after a2."""
    (tree,), _ = read_trees([write(tmp_path / "tree.jsonl", [tree_row(SMALL)])], progress=False)
    found = whole_conversations([prompt for prompt in tree.prompts if prompt.is_prompt])
    assert [words(first) for first in found] == ["u:q1"] * 3
    later = [[words(prompt) for prompt in first.later] for first in found]
    assert sorted(later) == [["u:q1 a:a1 u:q2"], ["u:q1 a:a1 u:q3"], ["u:q1 a:a2 u:q4"]]
    # The human responses to the later turn are included.
    assert {words(p): [r.text for r in p.references] for first in found for p in first.later} == {
        "u:q1 a:a1 u:q2": ["a3"], "u:q1 a:a1 u:q3": [], "u:q1 a:a2 u:q4": []
    }  # fmt: skip


def test_batches_of_whole_conversations(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    """A row is the first prompt, with the later user messages; also when it comes from the cache."""
    rows = [chat("x", "A", "y", "B", "z"), chat("c", "A")]
    needs = DataNeeds("ppo", byte_tokenizer, max_length=64, max_new_tokens=8, whole_conversations=True)
    for _ in range(2):
        data = module(write(tmp_path / "data.jsonl", rows), needs, tmp_path, batch_size=2)
        data.setup("fit")
        batch: PromptBatch = only(data.train_dataloader())
        first = next(c for c in batch.conversations if c.messages[0].text == "x")
        assert [words(prompt) for prompt in first.later] == ["u:x a:A u:y", "u:x a:A u:y a:B u:z"]
        assert {tuple(row[mask].tolist()) for row, mask in zip(batch.ids, batch.attention_mask, strict=True)} == {
            (USER, X, END, BOT),
            (USER, C, END, BOT),
        }


@pytest.mark.parametrize("later", [False, True])
def test_later_turns_of_the_demo_and_of_oasst_are_trained_on(
    tmp_path: Path, tokenizer: ChatTokenizer, later: bool
) -> None:
    """As separate prompts, or one after the other in their conversation."""
    write_demo_corpus(tmp_path / "demo.jsonl", trees=200, seed=0)
    for file in (tmp_path / "demo.jsonl", OASST):
        needs = DataNeeds("ppo", tokenizer, max_length=256, max_new_tokens=16, whole_conversations=later)
        data = module(str(file), needs, tmp_path)
        data.setup("fit")
        conversations = [c for batch in data.train_dataloader() for c in batch.conversations]
        asked = [sum(message.role == "user" for message in c.messages) for c in conversations]
        turns = [1 + len(c.later) for c in conversations]
        if later:
            assert set(asked) == {1}
            assert sum(n > 1 for n in turns) > 10
        else:
            assert sum(n > 1 for n in asked) > 10
            assert set(turns) == {1}
