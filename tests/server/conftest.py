"""Fixtures of the API tests. A module that needs another model or server overrides them."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from helpers.chat_models import random_policy
from helpers.servers import Server, serving

from rlchat.models.model_file import PolicyBundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def bundle(tokenizer: ChatTokenizer) -> PolicyBundle:
    """A small random model."""
    return random_policy(tokenizer, max_length=128)


@pytest.fixture(scope="module")
def server(bundle: PolicyBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of that model, for all tests of a module."""
    with serving(bundle, tmp_path_factory.mktemp("kept") / "feedback.jsonl") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client of that server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
