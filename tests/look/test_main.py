"""The command line of `rlchat look`, the file that it writes, and its server."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.look_runs import add_rows, rollout, write_run

from rlchat.__main__ import main
from rlchat.look.server import LookServer, Run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_newest_run_is_the_default(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age, version in ((100, 1), (300, 0), (200, 10)):
        run = write_run(here / "lightning_logs" / "ppo" / f"version_{version}", [rollout(reply=f"run {version}")])
        os.utime(run / "rollouts.jsonl", (1e9 - age, 1e9 - age))
    (here / "lightning_logs" / "sft" / "version_0").mkdir(parents=True)
    assert main(["look", "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "page.html: ppo/version_1\n"
    page = Path("page.html").read_text(encoding="utf-8")
    assert "run 1" in page
    assert "run 10" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing from elsewhere


def test_two_runs(here: Path) -> None:
    for name in "ab":
        write_run(here / name / "ppo" / "version_0", [rollout(reply=f"run {name}")])
    assert main(["look", "a/ppo/version_0", "--with", "b/ppo/version_0", "--out", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert all(f"run {name}" in page for name in "ab")
    assert '"runs": ["a/ppo/version_0", "b/ppo/version_0"]' in page


def test_text_cannot_end_the_data(here: Path) -> None:
    write_run(here / "run", [rollout(reply="</script><script>alert(1)</script><!-- data -->")])
    assert main(["look", "run", "--out", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    assert page.count("<script>") == page.count("</script>") - 2 == 1  # its own, and two blocks of data


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no PPO run with a rollouts.jsonl under lightning_logs; train one with `rlchat fit --config ppo`, or "),
        (["missing"], "missing: no such folder; specify that of a PPO run, such as lightning_logs/ppo/version_0"),
        (
            ["empty"],
            "empty: it has no rollouts.jsonl, which the callback RolloutLog writes during PPO, in every --roll",
        ),
        (["run", "--with", "empty"], "empty: it has no rollouts.jsonl"),
        (["run", "--out", "run/rollouts.jsonl/page.html"], "run/rollouts.jsonl/page.html: cannot be written: "),
    ],
)
def test_errors_are_one_sentence(words: list[str], error: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    write_run(here / "run", [rollout()])
    assert main(["look", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlchat: {error}")
    assert said.count("\n") == 1


def test_a_port_in_use_is_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "run", [rollout()])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert main(["look", "run", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: " in capsys.readouterr().err
    assert main(["look", "run", "--port", "70000"]) == 2
    assert "invalid value '70000': expected an integer from 0 to 65535" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LookServer]:
    run = write_run(tmp_path / "run", [rollout()], "step,train/reward\n0,1.0\n")
    with LookServer([Run(run)], ["run"], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: LookServer, path: str, host: str | None = None, method: str = "GET") -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_the_server_sends_what_is_new(server: LookServer) -> None:
    status, headers, text = ask(server, "/runs/0?first=0")
    head = json.loads(text.split("\n")[0])
    assert (status, headers["Cross-Origin-Resource-Policy"]) == (200, "same-origin")
    assert len(head["rows"]) == 1
    assert head["curves"] == {"train/reward": [[1], [1.0]]}
    known = f"source={head['source']}&curves={head['stamp']}"
    add_rows(server.runs[0].folder, [rollout(iteration=2)])
    head = json.loads(ask(server, f"/runs/0?first=1&{known}")[2].split("\n")[0])
    assert [row[0] for row in head["rows"]] == [2]
    assert head["curves"] is None
    (server.runs[0].folder / "rollouts.jsonl").unlink()
    assert ask(server, "/runs/0?first=0")[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403), ("[", 403)],
)
def test_other_host_names_are_refused(host: str, status: int, server: LookServer) -> None:
    """A web page elsewhere could make its own name point to this machine (DNS rebinding)."""
    for path in ("/", "/runs/0?first=0"):
        found, _, text = ask(server, path, host)
        assert found == status
        assert ("Hello" in text or "<!doctype html>" in text) == (status == 200)


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/runs/1", "GET", 404),
        ("/runs/0?first=x", "GET", 404),
        ("/runs/0?first=-1", "GET", 404),
        ("/runs/0?first=%C2%B2", "GET", 404),
        ("/../rollouts.jsonl", "GET", 404),
        ("/rollouts.jsonl", "GET", 404),
        ("/", "POST", 501),
    ],
)
def test_nothing_else_is_served(path: str, method: str, status: int, server: LookServer) -> None:
    assert ask(server, path, method=method)[0] == status
