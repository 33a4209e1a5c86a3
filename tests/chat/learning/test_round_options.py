"""`--learn-args` of a chat that learns: what is refused before a model is loaded, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlchat.__main__ import main
from rlchat.chat.learning.options import supervisor_arguments
from rlchat.chat.learning.round_options import check_chat_round
from rlchat.chat.options import parser
from rlchat.errors import UserError

SEE = "; `rlchat learn --help` shows all options"


@pytest.fixture(autouse=True)
def files(workplace: Path) -> None:
    Path("data.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    Path("table.parquet").write_bytes(b"PAR1\0\0\0\0")
    os.mkfifo("pipe")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--metod ppo", f"unrecognized arguments: --metod{SEE}"),
        ("--help", f"unrecognized arguments: --help{SEE}"),
        ("--seed", f"argument --seed: expected one argument{SEE}"),
        ("--seed one", f"argument --seed: invalid int value: 'one'{SEE}"),
        ("--seed -1", "invalid value -1 for --seed: expected an integer from 0 to 2**32 - 1"),
        ("--seed 4294967296", "invalid value 4294967296 for --seed: expected an integer from 0 to 2**32 - 1"),
        ("--learning-rate 0", "invalid value 0.0 for --learning-rate: expected a positive number"),
        ("--beta nan", "invalid value nan for --beta: expected a positive number"),
        ("--learning-rate inf", "invalid value inf for --learning-rate: expected a finite number"),
        ("--max-perplexity-rise -0.1", "invalid value -0.1 for --max-perplexity-rise: expected a non-negative number"),
        ("--passes 0", "invalid value 0 for --passes: expected a positive integer"),
        ("--iterations 0", "invalid value 0 for --iterations: expected a positive integer"),
        ("--lora-rank 0", "invalid value 0 for --lora-rank: expected a positive integer"),
        ("--max-new-tokens 0", "invalid value 0 for --max-new-tokens: expected a positive integer"),
        ("--replay-prompts 0", "invalid value 0 for --replay-prompts: expected a positive integer"),
        ("--control-prompts -3", "invalid value -3 for --control-prompts: expected a positive integer"),
        ("--max-kl -1", "invalid value -1.0 for --max-kl: expected a non-negative number"),
        ("--max-control-drop nan", "invalid value nan for --max-control-drop: expected a non-negative number"),
        ("--replay gone.jsonl", "no such data file: gone.jsonl; check the path"),
        ("--replay data.jsonl gone.jsonl", "no such data file: gone.jsonl; check the path"),
        ("--replay .", ". is a directory; pass the .jsonl or .jsonl.gz files in it"),
        ("--replay pipe", "pipe is a pipe, which only the first round could read; save it to a file"),
        ("--feedback mine.jsonl", "--feedback cannot be set here: a round reads the --feedback of the chat"),
        ("--feed mine.jsonl", "--feedback cannot be set here: a round reads the --feedback of the chat"),
        ("--out=new.pt", "--out cannot be set here: the chat finds versions only in the folder beside its model"),
        ("--current 1.pt", "--current cannot be set here: it is the version that answers"),
        ("--on-bad-line error", "--on-bad-line cannot be set here: damaged lines are skipped and counted"),
        ("--base-model gpt2", "--base-model cannot be set here: pass --base-model to the chat"),
        ("--threads 2", "--threads cannot be set here: a round has one thread, so that the chat stays fast"),
        ("--background", "--background cannot be set here: a round always runs in the background"),
        ("--max-memory 4", "--max-memory cannot be set here: set --learn-memory"),
        ("other.pt", "the model other.pt cannot be set here: a round learns for the model of the chat"),
    ],
)
def test_refused(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is missing, too: what is wrong with the options comes first."""
    assert main(["chat", "nothing.pt", "--learn", f"--learn-args={words}"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"rlchat: --learn-args: {sentence}\n")


def test_a_bad_choice_and_a_file_of_another_kind() -> None:
    with pytest.raises(UserError, match=r"^--learn-args: argument --method: invalid choice: 'sft' \(choose from .*dpo"):
        check_chat_round(["--method", "sft"])
    with pytest.raises(UserError, match=r"^--learn-args: table.parquet is a Parquet file, which is not supported; "):
        check_chat_round(["--replay", "table.parquet"])


def test_lora_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlchat.chat.learning.round_options.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--learn-args: --train lora needs peft: install it with .*"):
        check_chat_round(["--train", "lora"])
    check_chat_round(["--train", "full"])


def test_what_a_round_can_have() -> None:
    words = "--method ppo --replay data.jsonl --seed 0 --max-kl 0 --train full --any-model --device cuda:1"
    options = parser().parse_args(["--learn", f"--learn-args={words}", "--device", "cpu", "--base-model", "gpt2"])
    assert supervisor_arguments(options)["options"] == ("--device", "cpu", "--base-model", "gpt2", *words.split())
    check_chat_round([])


def test_no_option_is_wrong_for_the_round_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """`rlchat learn` and `--learn-args` have the same checks."""
    assert main(["learn", "nothing.pt", "--feedback", "f.jsonl", "--replay", "gone.jsonl"]) == 2
    assert capsys.readouterr().err == "rlchat: no such data file: gone.jsonl; check the path\n"
    assert main(["learn", "nothing.pt", "--feedback", "f.jsonl", "--max-memory", "-1"]) == 2
    assert capsys.readouterr().err == "rlchat: invalid value -1.0 for --max-memory: expected a positive number\n"
    assert main(["learn", "nothing.pt", "--feedback", "f.jsonl", "--max-memory", "inf"]) == 2
    assert capsys.readouterr().err == "rlchat: invalid value inf for --max-memory: expected a finite number\n"


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_wrong_options_need_no_torch(command: str) -> None:
    if command == "serve":
        pytest.importorskip("fastapi")
    code = (
        "import sys; from rlchat.__main__ import main; "
        f"code = main(['{command}', '--learn', '--learn-args=--replay gone.jsonl']); "
        "print(code, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stderr == "rlchat: --learn-args: no such data file: gone.jsonl; check the path\n"
    assert run.stdout == "2 False\n"
