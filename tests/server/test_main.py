"""`rlchat serve` as a process: curl and OpenAI's client, signals, errors at the start."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from helpers.chat_models import random_policy
from helpers.servers import HTTP, ROOT, alone, server_process

from rlchat.__main__ import main
from rlchat.models.model_file import PolicyBundle, identity, load_policy, save_bundle
from rlchat.models.sampling import Sampling
from rlchat.server.main import _listen
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.imports import install_command


@pytest.fixture(scope="module")
def bundle(tokenizer: ChatTokenizer) -> PolicyBundle:
    return random_policy(tokenizer, max_length=128)


@pytest.fixture(scope="module")
def folder(bundle: PolicyBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_bundle(folder / "parrot.pt", bundle)
    return folder


def test_a_server_process_from_start_to_ctrl_c(folder: Path, bundle: PolicyBundle) -> None:
    with server_process("parrot.pt", "--feedback", "kept/mine.jsonl", cwd=folder) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        expected = alone(bundle, "Hi", Sampling(8, 0.0))
        body = {"model": "parrot", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.models.list().data[0].id == "parrot"
        assert client.chat.completions.create(**body).choices[0].message.content == expected  # type: ignore[call-overload]
        chunks = client.chat.completions.create(**body, stream=True)  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected

        if curl := shutil.which("curl"):
            command = [curl, "-sS", "-N", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
            whole = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, check=True).stdout
            assert json.loads(whole)["choices"][0]["message"]["content"] == expected
            streamed = subprocess.run(
                [*command, json.dumps({**body, "stream": True})], capture_output=True, text=True, check=True
            ).stdout
            assert streamed.endswith("data: [DONE]\n\n")
            pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
            assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == expected

        opinion = {"messages": body["messages"], "reply": expected, "verdict": "bad"}
        assert HTTP.post(f"{url}/feedback", json=opinion).status_code == 200
        (row,) = (folder / "kept" / "mine.jsonl").read_text().splitlines()
        assert json.loads(row)["prompt"]["replies"][0]["model_name"] == "parrot.pt"  # as from the terminal
        assert json.loads(row)["model_id"] == identity(load_policy(folder / "parrot.pt"))

        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_a_key_from_the_environment_and_sigterm_during_a_response(folder: Path) -> None:
    with server_process("parrot.pt", cwd=folder, RLCHAT_API_KEY="s3cret") as (process, url):
        assert HTTP.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": 16, "temperature": 2}
        with HTTP.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
            lines = filter(None, answer.iter_lines())
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            *_, last = lines  # the whole stream, or an error where the server stopped it
            assert last == "data: [DONE]" or "generation failed" in last
            assert process.wait(60) == 0
        assert process.stderr
        assert process.stderr.read() == ""


def test_connections_have_tcp_nodelay() -> None:
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(("words", "threads"), [(["--threads", "3"], 3), ([], 2)])
def test_threads_of_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], threads: int
) -> None:
    counts = []

    def run(server: Any, sockets: Any) -> None:
        with ThreadPoolExecutor() as pool:  # as the engine, another thread than the one that set the number
            counts.append(pool.submit(torch.get_num_threads).result())
        server._abort()

    monkeypatch.setattr("rlchat.server.protocol.Server.run", run)
    monkeypatch.setattr("rlchat.utils.threads.fastest_threads", lambda rounds, rows, width, gain: 2)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    usual = torch.get_num_threads()
    try:
        assert main(["serve", str(folder / "parrot.pt"), "--port", "0", "--feedback", str(tmp_path / "f"), *words]) == 0
    finally:
        torch.set_num_threads(usual)
    assert counts == [threads]


def test_a_port_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(folder / "parrot.pt"), "--port", str(port)]) == 2
    sentence = f"rlchat: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port or --host\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing.pt"], r"nothing\.pt: no such model file; train one with `rlchat demo`"),
        (["foreign.pt"], r"foreign\.pt: not an rlchat model file"),
        (["damaged.pt"], r"damaged\.pt: damaged, or not an rlchat model file"),
        (
            ["parrot.pt", "--device", "abacus"],
            "device 'abacus' is not available on this machine; use another, for example cpu",
        ),
        (["parrot.pt", "--feedback", "."], r"cannot write feedback to \.: Is a directory; choose another file"),
        (["nothing.pt", "--feedback", "parrot.pt/kept/f"], "cannot write feedback to parrot.pt/kept/f: Not a dir"),
        (
            ["parrot.pt", "--learn", "--host", "0.0.0.0"],
            r"--learn on 0\.0\.0\.0, which others can reach, needs --api-key: they could teach the model",
        ),
        (["parrot.pt", "--every", "3"], "--every has an effect only with --learn"),
        (["parrot.pt", "--learn", "--learn-args", "'"], "--learn-args: no closing quotation; quote it as for a shell"),
        (["nothing.pt", "--learn", "--learn-args=--metod ppo"], "--learn-args: unrecognized arguments: --metod; "),
        (
            ["parrot.pt", "--learn", "--learn-args=--max-new-tokens 99999"],
            "--learn-args: invalid value 99999 for max_new_tokens: it leaves no room for a prompt in max_length ",
        ),
        (["parrot.pt", "--learn", "--learn-args=--device abacus"], "device 'abacus' is not available on this machine"),
        (["nothing.pt", "--learn"], r"nothing\.pt: no such model file; train one with `rlchat demo`"),
        (
            ["1.pt", "--learn"],
            r"1\.pt has the name of a version: copy it to a file with another name, to learn from that",
        ),
        (["parrot.pt", "--host", "no.such.host.invalid"], r"cannot listen on no\.such\.host\.invalid:0: "),
    ],
)
def test_startup_errors(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(folder)
    torch.save({"a": torch.zeros(3)}, "foreign.pt")
    Path("damaged.pt").write_bytes(Path("parrot.pt").read_bytes()[:5000])
    Path("1.pt").write_bytes(Path("parrot.pt").read_bytes())
    assert main(["serve", *words, "--port", "0"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"rlchat: {sentence}.*\n", printed.err), printed.err


def test_a_missing_package_in_a_clone(folder: Path) -> None:
    program = "import sys; sys.modules['fastapi'] = None; from rlchat.__main__ import main; sys.exit(main(['serve']))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    command = f"{shlex.quote(sys.executable)} -m pip install -e {shlex.quote(f'{ROOT}[serve]')}"  # this is a clone
    assert result.stderr == f"rlchat: rlchat serve needs fastapi: install it with {command}\n"


def test_a_missing_package_after_an_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlchat.utils.imports.__file__", str(tmp_path / "lib" / "rlchat" / "utils" / "imports.py"))
    command = shlex.split(install_command("serve"))
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert {re.split("[<>=~!\\[]", name)[0].strip() for name in command[4:]} >= {
        "fastapi",
        "uvicorn",
        "prometheus-client",
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-rows", "0"], "argument --max-rows: invalid value '0': expected a positive integer"),
        (["--max-rows", "1.5"], "argument --max-rows: invalid value '1.5': expected a positive integer"),
        (["--port", "x"], "argument --port: invalid value 'x': expected an integer from 0 to 65535"),
        (
            ["--allow-origin", "localhost"],
            "argument --allow-origin: invalid value 'localhost': expected an origin such as http://localhost:3000",
        ),
        (["--learn-memory", "0"], "argument --learn-memory: invalid value '0': expected a positive number"),
        (["--port", "99999"], "argument --port: invalid value '99999': expected an integer from 0 to 65535"),
    ],
)
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert main(["serve", *words]) == 2
    assert capsys.readouterr().err.endswith(f"{sentence}\n")


def test_help_names_every_option_and_not_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLCHAT_API_KEY", "s3cret")
    assert main(["serve", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("--host", "--port", "--api-key", "--feedback", "--threads", "--max-rows", "--max-waiting"):
        assert name in printed
    assert "s3cret" not in printed
