"""A server that learns: the swap, its endpoints, limits and metrics, with quick rounds in place of real ones."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from helpers.chat_models import chain, scripted_policy
from helpers.servers import HTTP, ROOT, Server, learning_server, serving, slow_down, wait_until

from rlchat.chat.feedback import client_digest
from rlchat.chat.learning.supervisor import Supervisor
from rlchat.errors import UserError
from rlchat.models.model_file import PolicyBundle, identity, load_policy, save_bundle
from rlchat.server.feedback.caps import Caps
from rlchat.server.feedback.clients import Addresses
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.files import write_atomically


@pytest.fixture
def model(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> Path:
    """A model that says "old " again and again; the one beside it says "new!"."""
    for name, text in (("tiny.pt", b"old "), ("new.pt", b"new!")):
        bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(text), endless=True))
        if name == "new.pt":
            bundle.about["learned"] = {"model_id": identity(load_policy(tmp_path / "tiny.pt"))}
        save_bundle(tmp_path / name, bundle)
    return tmp_path / "tiny.pt"


@pytest.fixture
def learner(model: Path) -> Iterator[tuple[Server, Supervisor]]:
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as server:
        yield server


def ask(server: Server, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8, **more}
    return HTTP.post(f"{server.url}/v1/chat/completions", json=body)


def rate(server: Server, number: int, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": f"Question {number}"}], "reply": "No.", "verdict": "bad", **more}
    return HTTP.post(f"{server.url}/feedback", json=body)


def status(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = HTTP.get(f"{server.url}/learning").json()
    return found


def learn(server: Server, supervisor: Supervisor, rounds: int = 1) -> None:
    for number in range(2):
        assert rate(server, 10 * rounds + number, client="a").status_code == 200
    wait_until(lambda: len(supervisor.status().rounds) == rounds and supervisor.status().training_since is None)


def test_a_new_version_answers_and_can_be_rolled_back(learner: tuple[Server, Supervisor]) -> None:
    server, supervisor = learner
    first = ask(server)
    assert first.json()["choices"][0]["message"]["content"] == "old old "
    assert (first.json()["system_fingerprint"], first.headers["X-Rlchat-Version"]) == ("tiny.pt", "tiny.pt")
    assert HTTP.get(f"{server.url}/v1/models").json()["data"][0]["learns"] is True
    start = status(server)
    assert (start["version"], start["file"], start["previous"], start["rounds"]) == (0, "tiny.pt", None, [])
    learn(server, supervisor)
    second = ask(server)
    assert second.json()["choices"][0]["message"]["content"] == "new!new!"
    assert (second.json()["system_fingerprint"], second.headers["X-Rlchat-Version"]) == ("1.pt", "1.pt")
    now = status(server)
    assert (now["version"], now["file"], now["previous"], now["versions"]) == (1, "1.pt", 0, [0, 1])
    assert (now["rounds"][0]["before"]["agrees"], now["rounds"][0]["after"]["agrees"]) == (1, 2)
    assert now["rounds"][0]["sentence"].startswith("version 1 has learned from 2 verdicts")
    answer = HTTP.post(f"{server.url}/learning/rollback", json={})
    assert (answer.status_code, answer.json()["version"], answer.json()["new"]) == (200, 0, 0)
    assert ask(server).json()["choices"][0]["message"]["content"] == "old old "
    assert HTTP.post(f"{server.url}/learning/rollback", json={"version": 1}).json()["file"] == "1.pt"
    missing = HTTP.post(f"{server.url}/learning/rollback", json={"version": 7})
    assert (missing.status_code, missing.json()["error"]["message"]) == (
        400,
        "there is no version 7; expected one of 0, 1",
    )
    assert HTTP.post(f"{server.url}/learning/rollback", json={"version": -1}).status_code == 400


def test_a_stream_ends_on_the_model_that_began_it(model: Path) -> None:
    def load(path: Path) -> PolicyBundle:
        return slow_down(load_policy(path, "cpu"), 0.01)

    with learning_server(model, "--copy", str(model.with_name("new.pt")), load=load) as (server, supervisor):
        body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 50, "stream": True}
        with HTTP.stream("POST", f"{server.url}/v1/chat/completions", json=body) as stream:
            assert stream.headers["X-Rlchat-Version"] == "tiny.pt"
            lines = stream.iter_lines()
            begun = [next(lines) for _ in range(6)]
            rate(server, 1)
            rate(server, 2)
            wait_until(lambda: supervisor.active()[0] == 1)
            assert ask(server).json()["system_fingerprint"] == "1.pt"
            rest = [*begun, *lines]
    chunks = [json.loads(line.removeprefix("data: ")) for line in rest if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == ("old " * 13)[:50]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"tiny.pt"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_all_endpoints_name_the_version(learner: tuple[Server, Supervisor]) -> None:
    server, supervisor = learner
    learn(server, supervisor)
    text = {"prompt": "a", "max_tokens": 4, "temperature": 0}
    whole = HTTP.post(f"{server.url}/v1/completions", json=text)
    assert (whole.headers["X-Rlchat-Version"], whole.json()["system_fingerprint"]) == ("1.pt", "1.pt")
    scored = HTTP.post(f"{server.url}/v1/completions", json={**text, "max_tokens": 0, "echo": True, "logprobs": 1})
    assert scored.headers["X-Rlchat-Version"] == "1.pt"
    streamed = HTTP.post(f"{server.url}/v1/completions", json={**text, "stream": True})
    assert '"system_fingerprint":"1.pt"' in streamed.text
    for stream in (False, True):
        answer = HTTP.post(f"{server.url}/v1/responses", json={"input": "a", "max_output_tokens": 4, "stream": stream})
        assert answer.headers["X-Rlchat-Version"] == "1.pt"


def test_feedback_names_the_version_that_generated_the_response(learner: tuple[Server, Supervisor]) -> None:
    server, supervisor = learner
    learn(server, supervisor)
    rate(server, 5, model="tiny.pt")
    rate(server, 6)
    rate(server, 7, model="old.pt")  # a conversation in the browser may be older than the server
    *rows, foreign = [json.loads(line) for line in server.feedback.read_text().splitlines()]
    assert foreign["prompt"]["replies"][0]["model_name"] == "old.pt"
    assert "model_id" not in foreign
    assert [row["prompt"]["replies"][0]["model_name"] for row in rows] == ["tiny.pt", "tiny.pt", "tiny.pt", "1.pt"]
    assert {row["model_id"] for row in rows} == {server.engine.loaded.model_id} != {""}
    for name in ("../other.pt", "", "a" * 257, "a\nb"):
        answer = rate(server, 7, model=name)
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            400,
            "model: expected the name of a file without its folder, of 1 to 256 characters",
        )
    assert rate(server, 7, client="a" * 65).json()["error"]["message"] == "client: expected at most 64 characters"
    assert rate(server, 7, messages=[]).json()["error"]["message"] == "messages: expected at least 1 of them, got 0"


def test_learning_is_turned_off_and_on(learner: tuple[Server, Supervisor]) -> None:
    server, supervisor = learner
    assert HTTP.post(f"{server.url}/learning", json={"on": False}).json()["on"] is False
    for number in range(3):
        rate(server, number)
    wait_until(lambda: status(server)["new"] == 3)
    assert status(server)["training_seconds"] is None
    assert HTTP.post(f"{server.url}/learning", json={"on": 1}).status_code == 400
    assert HTTP.post(f"{server.url}/learning", json={"on": True}).json()["on"] is True
    wait_until(lambda: supervisor.active()[0] == 1)


def test_too_many_verdicts_are_refused(model: Path) -> None:
    with learning_server(model, every=99, caps=Caps(per_client=2, in_all=3)) as (server, supervisor):
        assert [rate(server, number, client="a").status_code for number in range(3)] == [200, 200, 429]
        refused = rate(server, 3, client="a")
        assert refused.json()["error"]["message"] == (
            "this server takes 2 verdicts per hour from a client: try again in 60 minutes"
        )
        assert 3500 < int(refused.headers["Retry-After"]) <= 3600
        assert [rate(server, number).status_code for number in range(2)] == [200, 429]  # the address is the client
        taken_back = rate(server, 0, client="a", verdict="none")  # always possible
        assert (taken_back.status_code, taken_back.json()) == (200, {"kept": True})
        wait_until(lambda: supervisor.status().verdicts == 2)
        assert len(server.feedback.read_text().splitlines()) == 4


@pytest.mark.parametrize("learns", [True, False])
def test_only_a_verdict_that_there_is_can_be_taken_back(model: Path, learns: bool) -> None:
    if learns:
        context: Any = learning_server(model, every=99, caps=Caps(per_client=3, in_all=9))
    else:
        context = serving(load_policy(model, "cpu"), model.with_name("feedback.jsonl"))
    with context as started:
        server = started[0] if learns else started

        def size() -> int:
            return server.feedback.stat().st_size if server.feedback.exists() else 0

        for number in range(5):
            assert rate(server, number, client="a", verdict="none").json() == {"kept": False}
        assert size() == 0
        rate(server, 1, client="a", model="other.pt")
        assert rate(server, 1, client="b", verdict="none").json() == {"kept": False}
        assert rate(server, 1, client="a", reply="Yes.", verdict="none").json() == {"kept": False}
        assert [rate(server, 1, client="a", verdict="none").json()["kept"] for _ in range(3)] == [True, False, False]
        before = size()
        assert rate(server, 1, client="a", verdict="none").json() == {"kept": False}
        assert size() == before
        assert rate(server, 1, client="a").status_code == 200
        assert rate(server, 2, client="a").status_code == (429 if learns else 200)  # what was taken back counts
        assert rate(server, 1, client="a", verdict="none").json() == {"kept": True}  # always possible


def test_a_restart_does_not_lift_the_limits(model: Path) -> None:
    limits = Caps(per_client=2, in_all=4)
    with learning_server(model, every=99, caps=limits) as (server, _):
        assert [rate(server, number, client="a").status_code for number in range(3)] == [200, 200, 429]
        assert rate(server, 0, client="b").status_code == 200
    for _ in range(2):
        with learning_server(model, every=99, caps=limits) as (server, _):
            refused = rate(server, 3, client="a")
            assert refused.json()["error"]["message"].startswith("this server takes 2 verdicts per hour from a client")
            assert 3500 < int(refused.headers["Retry-After"]) <= 3600
    with learning_server(model, every=99, caps=limits) as (server, _):
        assert [rate(server, number).status_code for number in range(2)] == [200, 429]
        feedback = server.feedback
    assert "127.0.0.1" not in feedback.read_text()  # nor any other name of a client
    hour_ago = (datetime.now(timezone.utc) - timedelta(hours=1)).isoformat(timespec="seconds")
    feedback.write_text(re.sub('"created_date":"[^"]+"', f'"created_date":"{hour_ago}"', feedback.read_text()))
    with learning_server(model, every=99, caps=limits) as (server, _):
        assert rate(server, 3, client="a").status_code == 200


def test_anonymous_clients_are_their_addresses(model: Path) -> None:
    with learning_server(model, every=99) as (server, _):
        rate(server, 1)
        rate(server, 1, verdict="good")
        rate(server, 1, client="ann")
        rate(server, 1, client="address 127.0.0.1")  # nobody can pretend to be an address
        feedback = server.feedback
    with learning_server(model, every=99) as (server, _):
        rate(server, 1)
    rows = [json.loads(line) for line in feedback.read_text().splitlines()]
    assert [row["feedback_id"] == rows[0]["feedback_id"] for row in rows] == [True, True, False, False, True]
    assert [row["client"] == rows[0]["client"] for row in rows] == [True, True, False, False, True]
    assert [row["client"] for row in rows[2:4]] == [client_digest("ann"), client_digest("address 127.0.0.1")]
    assert {row["address"] for row in rows} == {Addresses(feedback).digest("127.0.0.1")}


def test_behind_a_proxy_on_this_machine_the_address_is_that_of_the_client(model: Path) -> None:
    with learning_server(model, every=99) as (server, _):
        body = {"messages": [{"role": "user", "content": "Hi"}], "reply": "No.", "verdict": "bad"}
        HTTP.post(f"{server.url}/feedback", json=body, headers={"X-Forwarded-For": "203.0.113.7"})
        (row,) = map(json.loads, server.feedback.read_text().splitlines())
        assert row["address"] == Addresses(server.feedback).digest("203.0.113.7")


@pytest.mark.skipif(sys.platform == "win32", reason="grep")
def test_the_verdicts_of_one_client_can_be_found_and_removed(model: Path) -> None:
    """With the commands in docs/learn.md. A text that looks like the field of a line stays what it is."""
    commands = re.findall(r"^(?:grep|mv|python -c) .*$", Path(ROOT, "docs/learn.md").read_text(), re.MULTILINE)
    counts, search, *removal, address = [command.partition("  #")[0] for command in commands]

    def shell(command: str, digest: str = "") -> str:
        command = command.replace("3f9a1c0de5b7a284", digest)
        command = re.sub("^python", sys.executable, command)
        return subprocess.run(command, shell=True, cwd=model.parent, check=True, capture_output=True, text=True).stdout

    bad = client_digest("eve")
    with learning_server(model, every=99) as (server, supervisor):
        for number in range(3):
            rate(server, number, client="eve")
        rate(server, 0, client="ann", reply=f'"client":"{bad}"')
        wait_until(lambda: supervisor.status().verdicts == 4)
        assert shell(counts).split() == ["3", f'"client":"{bad}"', "1", f'"client":"{client_digest("ann")}"']
        assert [json.loads(line)["client"] for line in shell(search, bad).splitlines()] == [bad] * 3
        assert shell(address).strip() == Addresses(server.feedback).digest("203.0.113.7")
        for command in removal:
            shell(command, bad)
        wait_until(lambda: supervisor.status().verdicts == 1)
        assert [json.loads(line)["client"] for line in server.feedback.read_text().splitlines()] == [
            client_digest("ann")
        ]


def test_metrics(learner: tuple[Server, Supervisor]) -> None:
    server, supervisor = learner
    learn(server, supervisor)
    rate(server, 5)
    wait_until(lambda: supervisor.status().new == 1)
    text = HTTP.get(f"{server.url}/metrics").text
    found = {name: float(value) for name, value in re.findall(r"^(rlchat_\w+) (\S+)$", text, re.MULTILINE)}
    wanted = {
        "rlchat_version": 1,
        "rlchat_verdicts": 3,
        "rlchat_verdicts_new": 1,
        "rlchat_training": 0,
        "rlchat_versions_accepted_total": 1,
        "rlchat_versions_rejected_total": 0,
        "rlchat_training_seconds_total": 0.75,
    }
    assert {name: found[name] for name in wanted} == wanted


def test_a_model_that_was_trained_again(model: Path, byte_tokenizer: ChatTokenizer) -> None:
    """The new model answers, `/learning` says why, and a verdict on a version of the old one is none on the new one."""
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as (server, supervisor):
        old = server.engine.loaded.model_id
        learn(server, supervisor)
    save_bundle(model, scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"next"), endless=True)))
    with learning_server(model) as (server, supervisor):
        now = status(server)
        assert now["notices"] == [
            "version 1 in tiny.versions is of another model named tiny.pt, and not used; no file is replaced: the next "
            "version has the number 2"
        ]
        assert (now["version"], now["versions"], now["previous"], now["rounds"]) == (0, [0], None, [])
        assert ask(server).json()["choices"][0]["message"]["content"] == "nextnext"
        assert HTTP.post(f"{server.url}/learning/rollback", json={"version": 1}).status_code == 400
        for number, name in enumerate(("1.pt", "tiny.pt", "5.pt")):
            assert rate(server, number, model=name).status_code == 200
        rows = [json.loads(line) for line in server.feedback.read_text().splitlines()[-3:]]
        assert [row.get("model_id") for row in rows] == [old, server.engine.loaded.model_id, None]
        assert old != server.engine.loaded.model_id


def test_a_full_disk_changes_nothing(
    learner: tuple[Server, Supervisor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, supervisor = learner
    learn(server, supervisor)
    before = status(server)

    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write = "rlchat.chat.learning.state.write_atomically"
    monkeypatch.setattr(write, lambda path, _: write_atomically(path, full))
    for path, body in (("learning", {"on": False}), ("learning/rollback", {"version": 0})):
        answer = HTTP.post(f"{server.url}/{path}", json=body)
        assert answer.status_code == 507
        assert answer.json()["error"]["message"] == "the server cannot write its state: see its log"
        assert status(server) == before
        assert ask(server).json()["system_fingerprint"] == "1.pt"
    assert "state.json: cannot be written: No space left on device" in caplog.text


def test_an_error_shows_no_folders(model: Path) -> None:
    with learning_server(model) as (server, supervisor):
        rate(server, 1, model="other.pt")
        wait_until(lambda: supervisor.status().error is not None)
        assert status(server)["error"] == "the verdicts in feedback.jsonl are on responses of other.pt, not of tiny.pt"
        assert ask(server).status_code == 200


def test_no_folder_reaches_a_client(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In errors, outcomes and what a factor of the reward says; what is left out is named."""
    home = tmp_path / "my secret folder"
    home.mkdir()
    bundle = load_policy(model, "cpu")
    factor = {"class_path": "rlchat.rewards.LearnedQuality", "init_args": {"bundle": "/home/my secret folder/x"}}
    bundle.about["reward"] = [factor]
    save_bundle(home / "tiny.pt", bundle)
    figures = {
        "reasons": [f"{home / 'tiny.versions'}/1.json is missing", "it forgets"],
        "notes": [f"{home}/other thing was not found"],
        "feedback": {"left_out": {"longer than max_length 64": 1}, "kinds": {"bad": 2}},
    }
    with learning_server(home / "tiny.pt", "--reject", "--figures", json.dumps(figures)) as (server, supervisor):
        rate(server, 1, model="other.pt")
        with server.feedback.open("a") as file:
            file.write("{\n")
        wait_until(lambda: status(server)["bad_lines"] == 1)
        found = status(server)
        assert (found["others"], found["other_models"], found["bad_lines"]) == (1, "other.pt", 1)
        kept = [line for line in server.feedback.read_text().splitlines(True) if line != "{\n"]
        server.feedback.write_text("".join(kept))
        learn(server, supervisor)
        found = status(server)
        assert found["rounds"][0]["sentence"] == "rejected: 1.json is missing; it forgets"
        assert found["rounds"][0]["learned_from"] == "3 verdicts (2 bad)"
        assert found["rounds"][0]["remarks"] == [
            "left out: 1 longer than max_length 64",
            "a figure of this round is only in the server's folder of versions",
        ]
        scored = HTTP.post(
            f"{server.url}/reward", json={"messages": [{"role": "user", "content": "Hi"}], "reply": "No."}
        )
        assert scored.json()["error"]["message"] == "it cannot be computed: see the server's log"
        for path, message in (
            (home / "tiny.versions" / "1.pt", "1.pt: damaged"),
            (home / "other thing.pt", "the server cannot do that: see the server's log"),
        ):
            monkeypatch.setattr(supervisor, "rollback", Mock(side_effect=UserError(f"{path}: damaged")))
            refused = HTTP.post(f"{server.url}/learning/rollback", json={"version": 1})
            assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)
        supervisor._error = "FileNotFoundError: [Errno 2] No such file or directory: '/home/my secret folder/x'"
        assert status(server)["error"] == "learning has failed: see the server's log"


def test_without_learning_there_is_no_such_endpoint(model: Path) -> None:
    with serving(load_policy(model, "cpu"), model.with_name("feedback.jsonl")) as server:
        assert HTTP.get(f"{server.url}/learning").status_code == 404
        assert HTTP.get(f"{server.url}/v1/models").json()["data"][0]["learns"] is False
        assert "rlchat_version" not in HTTP.get(f"{server.url}/metrics").text
        assert ask(server).json()["system_fingerprint"] == "tiny.pt"


def test_the_key_protects_learning(model: Path) -> None:
    with learning_server(model, api_key="secret") as (server, _):
        assert HTTP.get(f"{server.url}/learning").status_code == 401
        assert HTTP.post(f"{server.url}/learning/rollback", json={}).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert HTTP.get(f"{server.url}/learning", headers=key).status_code == 200
