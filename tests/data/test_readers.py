"""The registry: adding a format means adding one module to the folder of readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.data_rows import RowReader, prompts_of, threads_of, words, write

from rlchat.data import readers
from rlchat.data.formats import read_prompts
from rlchat.data.readers import reader_classes

NEW_FORMAT = """
from typing import Any
from rlchat.conversation import Message
from rlchat.data.readers.base import Reader, Row, conversation_row
from rlchat.data.readers.fields import text_field

class QuestionReader(Reader):
    name = "question and answer"
    required = frozenset({"question", "answer"})

    def read(self, row: dict[str, Any]) -> Row:
        question, answer = (text_field(row[key], key) for key in ("question", "answer"))
        return conversation_row((Message("user", question), Message("assistant", answer)))
"""


def test_a_new_module_in_the_folder_adds_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"question": "1 + 1?", "answer": "2", "level": 3}
    (tmp_path / "question_format_for_a_test.py").write_text(NEW_FORMAT)
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(tmp_path)])
    reader_classes.cache_clear()
    try:
        trees, report = RowReader(tmp_path)(row)
        assert threads_of(trees) == ["u:1 + 1? a:2"]
        assert prompts_of(trees) == ["u:1 + 1?"]
        assert report.unread == {"level": 1}
        assert [words(prompt) for prompt in read_prompts(write(tmp_path / "p.jsonl", row))] == ["u:1 + 1?"]
    finally:
        monkeypatch.undo()
        reader_classes.cache_clear()


def test_every_reader_has_a_unique_name_and_unique_keys() -> None:
    classes = reader_classes()
    assert len({reader.name for reader in classes}) == len(classes)
    assert len({reader.required for reader in classes}) == len(classes)
    assert all(reader.__doc__ for reader in classes)
