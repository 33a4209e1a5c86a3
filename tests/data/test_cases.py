"""Layouts and file types of users: the result of reading them, or the error and its advice."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import re
import threading
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.data_rows import RowReader, prompts_of, threads_of, tree_row, words, write

from rlchat.conversation import Message
from rlchat.data.corpus import DataNeeds
from rlchat.data.datamodule import OASST2DataModule
from rlchat.data.formats import ranked_pairs, read_prompts, read_trees
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


@pytest.fixture
def read(tmp_path: Path) -> RowReader:
    return RowReader(tmp_path)


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Hello!"}]},
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
            ]
        },
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": "Hi", "response": "Hello!"},
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completion": [{"role": "assistant", "content": "Hello!"}],
        },
        {"instruction": "Hi", "input": "", "output": "Hello!"},
    ],
)
def test_a_conversation_in_any_layout(read: RowReader, row: dict[str, Any]) -> None:
    ((tree,), report) = read(row)
    assert threads_of([tree]) == ["u:Hi a:Hello!"]
    assert prompts_of([tree]) == ["u:Hi"]
    assert tree.prompts[0].references == (Message("assistant", "Hello!"),)
    assert not report.warnings
    assert not report.unread


def test_developer_and_top_level_system_messages(read: RowReader) -> None:
    developer = {"messages": [{"role": "developer", "content": "Be short."}, *TALK["messages"]]}
    assert threads_of(read(developer)[0]) == ["s:Be short. u:Hi a:Hello!"]
    assert threads_of(read({**TALK, "system": "Be short."})[0]) == ["s:Be short. u:Hi a:Hello!"]


def test_the_input_follows_the_instruction(read: RowReader) -> None:
    trees, _ = read({"instruction": "Sort.", "input": "b a", "output": "a b", "text": "Below is an instruction…"})
    assert threads_of(trees) == ["u:Sort.\n\nb a a:a b"]


HH = "\n\nHuman: Where?\n\nAssistant: What?\n\nHuman: The red.\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HH, "response": " There.", "chosen": " Behind the hill.", "rejected": " Dunno."},
        {
            "prompt": [{"content": "Where?"}, {"content": "What?"}, {"content": "The red."}],
            "chosen": [{"role": "assistant", "content": "Behind the hill."}],
            "rejected": [{"role": "assistant", "content": "Dunno."}],
        },
        {
            "prompt": "The red.",
            "messages": [{"content": text} for text in ("Where?", "What?", "The red.", "Behind the hill.")],
            "chosen": [{"content": text} for text in ("Where?", "What?", "The red.", "Behind the hill.")],
            "rejected": [{"content": text} for text in ("Where?", "What?", "The red.", "Dunno.")],
            "score_chosen": 8.0,
        },
    ],
)
def test_a_pair_in_any_layout(read: RowReader, row: dict[str, Any]) -> None:
    ((tree,), _) = read(row)
    assert prompts_of([tree]) == ["u:Where? a:What? u:The red."]
    (pair,) = ranked_pairs(tree.prompts[0])
    assert [reply.text for reply in pair] == ["Behind the hill.", "Dunno."]


def test_a_kto_label_is_a_quality(read: RowReader) -> None:
    rows = [{"prompt": "Hi", "completion": text, "label": label} for text, label in (("Hello!", True), ("Go!", False))]
    ((tree,), report) = read(*rows)
    assert [(r.text, r.quality) for r in tree.prompts[0].references] == [("Hello!", 1.0), ("Go!", 0.0)]
    assert not report.warnings


def test_keys_that_change_the_meaning_of_a_row_are_used_or_reported(read: RowReader) -> None:
    weights = [
        {**TALK, "messages": [*TALK["messages"], {"content": "Again"}, {"content": "No.", key: value}]}
        for key, value in (("weight", 0), ("train", False), ("loss_weight", 0.0), ("loss_mask", 0))
    ]
    for row in weights:
        ((tree,), report) = read(row)
        assert threads_of([tree]) == ["u:Hi a:Hello!"]
        assert prompts_of([tree]) == ["u:Hi", "u:Hi a:Hello! u:Again"]
        assert tree.prompts[1].references == ()
        assert not report.warnings
        assert re.search(r"weights and labels: \w+ \(1 rows\)$", report.summary())
    labelled = [{"prompt": "Hi", "completion": "Hello!", "label": label} for label in (True, False)]
    _, report = read(*labelled, {**TALK, "weight": 0}, TALK)
    assert "weights and labels: weight (1 rows), label (2 rows)" in report.summary()
    _, report = read({**TALK, "rank": 3, "source": "x"}, {**TALK, "rank": 1, "weight": 0.5}, {**TALK, "id": 1})
    assert report.warning_lines() == [
        "2 rows have `rank`, which is not supported beside messages",
        "1 rows have `weight other than 0 and 1`, which is not supported",
    ]
    assert "unused keys: source (1 rows), id (1 rows)" in report.summary()
    assert "weights and labels" not in report.summary()


@pytest.mark.parametrize(
    "row",
    [
        TALK,
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go!"},
        {"text": "Hello!"},
        {"instruction": "Hi", "output": "Hello!"},
    ],
)
def test_weights_of_a_row_in_any_layout(read: RowReader, row: dict[str, Any]) -> None:
    other = {"prompt": "Bye", "completion": "See you."}
    for key in ("weight", "loss_weight", "train", "loss_mask"):
        trees, report = read({**row, key: 0}, other)
        assert threads_of(trees) == ["u:Bye a:See you."]
        assert report.warning_lines() == []
        _, report = read({**row, key: 0.5}, other)
        assert report.warning_lines() == [f"1 rows have `{key} other than 0 and 1`, which is not supported"]


@pytest.mark.parametrize(
    "text",
    [
        "### Human: Hi### Assistant: Hello!### Human: Bye### Assistant: See you.",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nSee you.<|im_end|>\n",
        "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: See you.",
        "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n<|assistant|>\nSee you.</s>",
    ],
)
def test_chat_markup_in_text_is_reported_and_split_on_request(read: RowReader, text: str) -> None:
    ((tree,), report) = read({"text": text})
    assert threads_of([tree]) == [f"a:{text}"]
    (warning,) = report.warning_lines()
    assert "markup of a chat" in warning
    assert "data.split_text=true" in warning
    ((tree,), report) = read({"text": text}, split_text=True)
    assert threads_of([tree]) == ["u:Hi a:Hello! u:Bye a:See you."]
    assert not report.warnings


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls is not supported"),
        ({"role": "tool", "content": "sun"}, "role 'tool' is not supported"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}, "part of type 'image_url'"),
        ({"role": "assistant", "content": " " * 1_000_000 + "a"}, "1,000,000 white-space characters in a row"),
        ({"role": "assistant", "content": ""}, "content is empty"),
    ],
)
def test_messages_that_cannot_be_trained_on(read: RowReader, message: dict[str, Any], reason: str) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, message]}
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{reason}"):
        read(row)
    trees, report = read(row, TALK, on_bad_line="skip")
    assert (threads_of(trees), report.bad_lines) == (["u:Hi a:Hello!"], 1)


def test_the_longest_accepted_run_of_spaces_can_be_tokenized(read: RowReader, tokenizer: ChatTokenizer) -> None:
    ((tree,), _) = read({"prompt": " " * 100_000 + "a"})
    assert tokenizer.encode(tree.prompts[0].messages[0].text)


def test_oasst_parent_ids_may_be_empty_or_integers(read: RowReader) -> None:
    def rows(root_parent: Any, root_id: Any, reply_id: Any) -> list[dict[str, Any]]:
        return [
            {"message_id": root_id, "parent_id": root_parent, "role": "prompter", "text": "Hi"},
            {"message_id": reply_id, "parent_id": root_id, "role": "assistant", "text": "Hello!"},
        ]

    for case in (rows("", "r", "a"), rows(None, 0, 1)):
        assert threads_of(read(*case)[0]) == ["u:Hi a:Hello!"]
    with pytest.raises(UserError, match="2 messages that lead to no root"):
        read(*rows("r", "r", "a"))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_element_by_element(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    rows = [{"prompt": f"question {i}", "completion": "a" * 30_000} for i in range(12)]
    path.write_text("\n " + json.dumps(rows, indent=indent))
    trees, report = read_trees([path])
    assert (len(trees), report.lines) == (12, 12)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in (TALK, {"x": 1})) + "\n]")
    with pytest.raises(UserError, match=r"rows\.json:3: no known format"):
        read_trees([path])
    path.write_text(f"[{json.dumps(TALK)},\n")
    with pytest.raises(UserError, match=r"rows\.json:2: the JSON array is damaged or truncated"):
        read_trees([path], on_bad_line="skip")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
def test_compressed_files(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / "rows"
    path.write_bytes(compress(json.dumps(TALK).encode()))
    assert threads_of(read_trees([path])[0]) == ["u:Hi a:Hello!"]
    path.write_bytes(compress(json.dumps(TALK).encode() * 99)[:-9])
    with pytest.raises(UserError, match="rows is a damaged or truncated compressed file"):
        read_trees([path], on_bad_line="skip")


def test_zstd_is_read_or_the_error_names_the_package(tmp_path: Path) -> None:
    path = tmp_path / "rows.zst"
    try:
        import zstandard
    except ModuleNotFoundError:
        path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
        with pytest.raises(UserError, match="pip install zstandard"):
            read_trees([path])
    else:
        path.write_bytes(zstandard.compress(json.dumps(TALK).encode()))
        assert threads_of(read_trees([path])[0]) == ["u:Hi a:Hello!"]


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_unsupported_file_types_are_named(tmp_path: Path, on_bad_line: Any) -> None:
    line = json.dumps(TALK)
    path = tmp_path / "rows"
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("rows.jsonl", line)
    for content, reason in (
        (line.encode("utf-16"), "text in UTF-16, .*iconv -f UTF-16 -t UTF-8"),
        (line.encode("utf-16-le"), "text in UTF-16, .*iconv -f UTF-16LE -t UTF-8"),
        (gzip.compress(gzip.compress(line.encode())), r"compressed twice \(gzip inside gzip\)"),
        ((tmp_path / "archive").read_bytes(), "a zip archive, .*unpack it"),
        (b"PAR1" + bytes(99), "a Parquet file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"rows is {reason}") as error:
            read_trees([path], on_bad_line=on_bad_line)
        assert "skip" not in str(error.value)


def test_latin1_error_advises_to_convert_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the line is not UTF-8 .*iconv -f LATIN1 -t UTF-8") as error:
        read_trees([path])
    assert "skip" not in str(error.value)


def test_home_folder_and_upper_case_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", TALK)
    assert threads_of(read_trees(["~/rows.jsonl"])[0]) == ["u:Hi a:Hello!"]
    (tmp_path / "QUESTIONS.TXT").write_text("Hi\nBye")
    (tmp_path / "questions.txt.gz").write_bytes(gzip.compress(b"Hi\nBye"))
    for name in ("QUESTIONS.TXT", "questions.txt.gz"):
        assert [words(prompt) for prompt in read_prompts(f"~/{name}")] == ["u:Hi", "u:Bye"]


def module(path: Any, tokenizer: ChatTokenizer, cache: Path, task: Any = "sft", **options: Any) -> OASST2DataModule:
    data = OASST2DataModule(path, cache_dir=str(cache), **options)
    data.needs = DataNeeds(task, tokenizer, 64, 16 if task == "ppo" else 0)
    data.setup("fit")
    return data


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_read_once(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = b"".join(json.dumps({"prompt": f"q{i}", "completion": "a"}).encode() + b"\n" for i in range(5))
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    data = module(str(pipe), byte_tokenizer, tmp_path / "cache")
    data.setup("validate")
    writer.join(timeout=60)
    loaders = data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()
    assert sum(len(loader.dataset) for loader in loaders) == 5  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_rejected_unread_on_several_processes(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process would get only a part. Nothing is written to this pipe, so opening it would block."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(OASST2DataModule, "_rank_and_world", lambda self: (1, 2))
    with pytest.raises(
        UserError, match="pipe is a pipe, which 2 processes cannot all read; write its content to a file"
    ):
        module(str(tmp_path / "pipe"), byte_tokenizer, tmp_path / "cache")


# ---- what a stage uses -----------------------------------------------------------------------------------------------


def test_only_trees_with_a_row_for_the_stage_are_split(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    rows: list[Any] = [{"prompt": f"fact {i}"} for i in range(200)]
    rows += [{"prompt": f"q{i}", "completion": "a"} for i in range(3)]
    data = module(str(write(tmp_path / "rows.jsonl", *rows)), byte_tokenizer, tmp_path)
    loaders = data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()
    sizes = [len(loader.dataset) for loader in loaders]  # type: ignore[arg-type]
    assert sizes == [1, 1, 1]


def test_feedback_on_a_held_out_prompt_is_held_out(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    from rlchat.chat.feedback import feedback_row
    from rlchat.conversation import Conversation

    questions = [f"question {i}" for i in range(40)]
    trees = [
        tree_row(
            {
                "message_id": f"m{i}",
                "role": "prompter",
                "text": question,
                "replies": [{"message_id": f"a{i}", "role": "assistant", "text": "yes"}],
            }
        )
        for i, question in enumerate(questions)
    ]
    given = [feedback_row(Conversation((Message("user", q),)), "no", "good") for q in questions]

    def splits(*rows: Any) -> dict[str, set[str]]:
        data = module(str(write(tmp_path / "d.jsonl", *rows)), byte_tokenizer, tmp_path, "ppo", val_fraction=0.3)
        loaders = {"train": data.train_dataloader(), "val": data.val_dataloader()[0]}
        rows_of = {name: loader.dataset for name, loader in loaders.items()}
        return {
            name: {rows.prompts.conversations[row].messages[0].text for row in rows.rows}  # type: ignore[attr-defined]
            for name, rows in rows_of.items()
        }

    alone, both = splits(*trees), splits(*trees, *given)
    assert alone == both == splits(*given)
    assert len(alone["val"]) > 3


def test_validation_that_is_off_is_reported(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write(tmp_path / "rows.jsonl", *({"prompt": f"q{i}", "completion": "a"} for i in range(9))))
    module(path, byte_tokenizer, tmp_path)
    assert "validation is off" not in caplog.text
    module(path, byte_tokenizer, tmp_path, val_fraction=0.0)
    assert "validation is off, because data.val_fraction is 0" in caplog.text
    data = OASST2DataModule(path, cache_dir=str(tmp_path))
    data.needs = DataNeeds("sft", byte_tokenizer, 64)
    data.trainer = mock.Mock(limit_val_batches=0, fast_dev_run=0, global_rank=0, world_size=1)
    data.setup("fit")
    assert "validation is off, because trainer.limit_val_batches is 0" in caplog.text


def test_warnings_are_restored_from_the_cache(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rlchat")
    path = str(write(tmp_path / "rows.jsonl", *({**TALK, "rank": i} for i in range(3))))
    for _ in range(2):
        caplog.clear()
        module(path, byte_tokenizer, tmp_path / "cache")
        assert "3 rows have `rank`" in caplog.text
    assert "read from the cache" in caplog.text
