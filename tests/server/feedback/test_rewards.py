"""`/reward` of a server that learns: a response is scored by the version that generated it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_models import chain, scripted_policy
from helpers.servers import HTTP, Server, learning_server, wait_until

from rlchat.chat.learning.supervisor import Supervisor
from rlchat.models.model_file import identity, load_policy, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def reward_of(words: int) -> list[dict[str, Any]]:
    return [{"class_path": "rlchat.rewards.TooShort", "init_args": {"min_words": words}}]


def write(path: Path, tokenizer: ChatTokenizer, reward: list[dict[str, Any]], critic: float, **about: Any) -> None:
    """A model with this reward, whose critic values every prompt at ``critic``."""
    bundle = scripted_policy(tokenizer, chain(tokenizer, list(b"word"), endless=True))
    with torch.no_grad():
        *_, bias = bundle.model.value_head.parameters()
        bias.fill_(critic)
    bundle.about.update(about, **({"reward": reward} if reward else {}))
    save_bundle(path, bundle)


@pytest.fixture
def model(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> Path:
    """A model whose reward wants 4 words; the one beside it wants 2."""
    write(tmp_path / "tiny.pt", byte_tokenizer, reward_of(4), 0.25)
    learned = {"model_id": identity(load_policy(tmp_path / "tiny.pt"))}
    write(tmp_path / "new.pt", byte_tokenizer, reward_of(2), 0.75, learned=learned)
    return tmp_path / "tiny.pt"


def score(server: Server, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "Hi"}], "reply": "Hello.", **more}
    return HTTP.post(f"{server.url}/reward", json=body)


def figures(server: Server, **more: Any) -> tuple[str, float, float]:
    found = score(server, **more).json()
    return found["model"], found["reward"], found["value"]


def learn(server: Server, supervisor: Supervisor, number: int) -> None:
    for question in "ab":
        body = {"messages": [{"role": "user", "content": f"{question}{number}"}], "reply": "No.", "verdict": "bad"}
        assert HTTP.post(f"{server.url}/feedback", json=body).status_code == 200
    wait_until(lambda: supervisor.active()[0] == number)


BEFORE, AFTER = ("tiny.pt", -0.75, 0.25), ("1.pt", -0.5, 0.75)  # one word of 4, and of 2


def test_each_version_has_its_own_reward_and_critic(model: Path) -> None:
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as (server, supervisor):
        assert figures(server) == figures(server, model="tiny.pt") == BEFORE
        learn(server, supervisor, 1)
        assert figures(server) == figures(server, model="1.pt") == AFTER
        assert figures(server, model="tiny.pt") == BEFORE
        assert HTTP.post(f"{server.url}/learning/rollback", json={}).json()["version"] == 0
        assert figures(server) == BEFORE
        assert figures(server, model="1.pt") == AFTER


def test_a_version_is_loaded_to_score_its_responses(model: Path) -> None:
    """Also if it was not active since the server was started, or was scored long ago."""
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as (server, supervisor):
        for number in (1, 2):
            learn(server, supervisor, number)
    with learning_server(model) as (server, _):
        for _ in range(2):
            for number in (1, 2):
                assert figures(server, model=f"{number}.pt") == (f"{number}.pt", *AFTER[1:])
            assert figures(server, model="tiny.pt") == BEFORE


def test_the_reply_says_whose_reward_it_is(model: Path) -> None:
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as (server, supervisor):
        learn(server, supervisor, 1)
        assert figures(server, model="old.pt") == AFTER  # of a conversation with another model
        HTTP.post(f"{server.url}/learning/rollback", json={})
    (model.with_name("tiny.versions") / "1.pt").unlink()
    with learning_server(model) as (server, _):
        assert figures(server, model="1.pt") == BEFORE
        assert score(server, model="../new.pt").status_code == 400


def test_a_model_that_was_replaced_scores_nothing(model: Path, byte_tokenizer: ChatTokenizer) -> None:
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as (server, supervisor):
        learn(server, supervisor, 1)
    with learning_server(model) as (server, _):
        assert supervisor.active()[0] == 1
        server.engine.swap(load_policy(model.with_name("tiny.versions") / "1.pt"), "1.pt")
        other = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"next"), endless=True))
        other.about["reward"] = reward_of(8)
        save_bundle(model, other)
        assert figures(server, model="tiny.pt") == AFTER


def test_a_version_may_have_a_reward_that_the_model_has_not(model: Path, byte_tokenizer: ChatTokenizer) -> None:
    def has_reward(server: Server) -> Any:
        return HTTP.get(f"{server.url}/v1/models").json()["data"][0]["has_reward"]

    write(model, byte_tokenizer, [], 0.25)
    learned = {"model_id": identity(load_policy(model))}
    write(model.with_name("new.pt"), byte_tokenizer, reward_of(2), 0.75, learned=learned)
    with learning_server(model, "--copy", str(model.with_name("new.pt"))) as (server, supervisor):
        assert has_reward(server) is False
        assert score(server).status_code == 400
        learn(server, supervisor, 1)
        assert has_reward(server) is True
        assert figures(server) == AFTER
        refused = score(server, model="tiny.pt")
        assert refused.status_code == 400
        assert "tiny.pt: the model file contains no reward" in refused.json()["error"]["message"]
