"""`rlchat tokenizer train`: training data, output and error messages."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlchat.__main__ import main
from rlchat.cli import tokenizer as tokenizer_cli
from rlchat.demo.corpus import write_demo_corpus
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def train(data: Path | list[Path], output: Path, vocab_size: int | str = 260, *options: str) -> int:
    paths = [data] if isinstance(data, Path) else data
    return main(["tokenizer", "train", *map(str, paths), "--vocab-size", str(vocab_size), "-o", str(output), *options])


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the texts that training gets."""
    texts: Counter[str] = Counter()
    real = tokenizer_cli.train_ranks

    def counting(given: Iterator[str], vocab_size: int, **named: Any) -> dict[bytes, int]:
        kept = list(given)
        texts.update(kept)
        return real(iter(kept), vocab_size, **named)

    monkeypatch.setattr(tokenizer_cli, "train_ranks", counting)
    return texts


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def oasst(text: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "lang": "en", "replies": list(replies), **more}


def test_every_message_is_used_once(tmp_path: Path, trained_on: Counter[str]) -> None:
    # "sure" occurs in three places; "why" and the message before it are in several threads and prompts.
    last = oasst("bye", "prompter", oasst("sure", "assistant"), oasst("see you", "assistant"))
    tree = oasst("hi", "prompter", oasst("why", "assistant", last), oasst("sure", "assistant"), message_id="m")
    pair = {"prompt": "pick one", "chosen": "good", "rejected": "bad"}
    talk = {"messages": [{"content": "ask", "role": "user"}, {"content": "sure", "role": "assistant"}]}
    data = write_rows(tmp_path / "data.jsonl", {"prompt": tree}, pair, talk, {"text": "alone"})
    assert train(data, tmp_path / "mine.tiktoken") == 0
    once = ("hi", "why", "bye", "see you", "pick one", "good", "bad", "ask", "alone")
    assert trained_on == {"sure": 3, **dict.fromkeys(once, 1)}


def test_plain_text_is_used_by_paragraph(tmp_path: Path, trained_on: Counter[str]) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\n\r\n  two\nThrée\n\n\nfour".encode())
    (tmp_path / "b.txt").write_bytes(b"\n  \nfive\n")
    rows = write_rows(tmp_path / "c.jsonl", {"text": "six"})
    assert train([tmp_path / "a.txt", rows, tmp_path / "b.txt"], tmp_path / "mine.tiktoken") == 0
    assert trained_on == dict.fromkeys(("One\r\n\r\n  two\n", "Thrée\n\n\n", "four", "five\n", "six"), 1)


def test_languages(tmp_path: Path, trained_on: Counter[str]) -> None:
    trees = [oasst(text, "prompter", message_id=text, lang=lang) for text, lang in (("hello", "en"), ("hola", "es"))]
    data = write_rows(tmp_path / "data.jsonl", *({"prompt": tree} for tree in trees))
    for number, (options, expected) in enumerate(
        [((), {"hello"}), (("--lang", "es"), {"hola"}), (("--lang", "any"), {"hello", "hola"})]
    ):
        trained_on.clear()
        assert train(data, tmp_path / f"{number}.tiktoken", 256, *options) == 0
        assert set(trained_on) == expected


def test_the_printed_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The commonest pair of bytes is the 257th token; each text is then two tokens for four bytes, or one pair of digits
    # for which there is none.
    (tmp_path / "data.txt").write_text("abab\nabab\n0")
    output = tmp_path / "mine.tiktoken"
    assert train(tmp_path / "data.txt", output, 257) == 0
    learned, gained, usage = capsys.readouterr().out.splitlines()
    assert learned == f"{output}: 257 tokens, trained on 3 texts of 11 bytes"
    # 11 bytes; ab ab \n ab ab \n 0 are 7 tokens.
    before = 11 / sum(len(ChatTokenizer().encode(text)) for text in ("abab\n", "abab\n", "0"))
    assert gained == f"bytes per token on this data: {before:.2f} with rlchat_1k, 1.57 with mine.tiktoken"
    assert usage.endswith(f"--model.tiktoken_encoding {output}")

    tokenizer = ChatTokenizer(str(output))
    assert tokenizer.base_size == 257
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("abab")] == [b"ab", b"ab"]


def test_fewer_tokens_than_requested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.txt").write_text("abc")  # ab, abc
    assert train(tmp_path / "data.txt", tmp_path / "mine.tiktoken", 5000) == 0
    assert "258 tokens (the data has no more pairs), trained" in capsys.readouterr().out


def test_the_demo_corpus_gzipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo_corpus(tmp_path / "demo.jsonl", trees=100)
    packed = tmp_path / "demo.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "demo.jsonl").read_bytes()))
    for data, output in ((tmp_path / "demo.jsonl", "a.tiktoken"), (packed, "b.tiktoken")):
        assert train(data, tmp_path / output, 600) == 0
    assert (tmp_path / "a.tiktoken").read_bytes() == (tmp_path / "b.tiktoken").read_bytes()
    tokenizer = ChatTokenizer(str(tmp_path / "a.tiktoken"))
    assert tokenizer.base_size == 600
    assert len(tokenizer.encode(" the")) == 1


def test_an_existing_output_is_kept_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.txt").write_text("abab")
    output = tmp_path / "mine.tiktoken"
    output.write_text("precious")
    assert train(tmp_path / "data.txt", output) == 2
    assert "already exists" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert train(tmp_path / "data.txt", output, 257, "--force") == 0
    assert ChatTokenizer(str(output)).base_size == 257
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt", "mine.tiktoken"]


@pytest.mark.parametrize("vocab_size", [-1, 0, 255, 1_000_001, 10**30])
def test_a_vocabulary_size_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str], vocab_size: int) -> None:
    assert train(tmp_path / "unread.jsonl", tmp_path / "mine.tiktoken", vocab_size) == 2
    err = capsys.readouterr().err
    assert err == (f"rlchat: invalid value {vocab_size} for --vocab-size: expected 256 to 1,000,000\n")


def test_unusable_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b" \n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot JSON\n')
    for name, complaint in {
        "absent.txt": "cannot read",
        "absent.jsonl": "no such data file",
        "latin.txt": "not UTF-8 (at byte 4)",
        "empty.txt": "no text in",
        "bad.jsonl": "bad.jsonl:2: not JSON",
    }.items():
        assert train(tmp_path / name, tmp_path / "mine.tiktoken") == 2
        err = capsys.readouterr().err
        assert complaint in err
        assert err.count("\n") == 1
    assert not (tmp_path / "mine.tiktoken").exists()
    assert train(tmp_path / "bad.jsonl", tmp_path / "mine.tiktoken", 256) == 2
    assert "fix the line, or skip it with --on_bad_line skip" in capsys.readouterr().err
    assert train(tmp_path / "bad.jsonl", tmp_path / "mine.tiktoken", 256, "--on_bad_line", "skip") == 0
    assert "skipped 1 bad line" in capsys.readouterr().err


def test_unwritable_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.txt").write_text("abab")
    assert train(tmp_path / "data.txt", tmp_path / "mine.json") == 2
    assert "must end in .tiktoken" in capsys.readouterr().err
    assert train(tmp_path / "data.txt", tmp_path / "data.txt" / "mine.tiktoken") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [[], ["train"], ["train", "x.txt", "--vocab-size", "many", "-o", "y.tiktoken"], ["sell"]]
)
def test_wrong_arguments_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", *args]) == 2
    assert "usage: rlchat tokenizer" in capsys.readouterr().err


def test_help_does_not_import_torch() -> None:
    program = "import sys; from rlchat.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", program, "tokenizer", "train", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("0 False\n")
    assert "--vocab-size N" in run.stdout
