"""Requests that schemathesis generates from the OpenAPI schema: no server errors, responses match the schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from helpers.chat_models import random_policy
from helpers.servers import serving
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rlchat.server.responses import Limits
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def api(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    feedback = tmp_path_factory.mktemp("kept") / "feedback.jsonl"
    with serving(random_policy(tokenizer), feedback, limits=Limits(max_tokens=4)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


ONE_MODEL = "GET /v1/models/{name}"
OPERATIONS = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "GET /v1/models",
    ONE_MODEL,
    "GET /health",
    "GET /metrics",
    "POST /feedback",
    "POST /reward",
]


def test_operations_of_the_schema(api: Any) -> None:
    assert [operation.ok().label for operation in api.get_all_operations()] == OPERATIONS


@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", OPERATIONS)
def test_generated_requests(api: Any, name: str, mode: GenerationMode, examples: int) -> None:
    """Valid and invalid requests."""
    operation = api.find_operation_by_label(name)
    statuses = Counter[int]()
    accepted: list[Any] = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and case.method == "POST":  # limits that only the description states
            for name_of_list in ("messages", "input"):
                if isinstance(case.body.get(name_of_list), list):
                    case.body[name_of_list].append({"role": "user", "content": "Hi"})
            for option in ("model", "continue_final_message", "top_logprobs"):
                case.body.pop(option, None)
            if name == "POST /v1/completions":
                case.body.update(prompt="Hi", max_tokens=2)
            if isinstance(case.body.get("input"), str):
                case.body["input"] += "Hi"
            if name == "POST /feedback" and case.body.get("verdict"):
                case.body.pop("correction", None)
        if mode is GenerationMode.POSITIVE and name == ONE_MODEL:  # the only one that there is
            case.path_parameters["name"] = "tiny"
        answer = case.call(timeout=30)
        statuses[answer.status_code] += 1
        if answer.status_code == 200:
            accepted.append(case.body)
        case.validate_response(
            answer,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    try:
        check()
    except Unsatisfiable:
        assert name.startswith("GET")  # these requests have nothing that could be invalid
    if mode is GenerationMode.POSITIVE:
        # This server has no reward model. Of a few feedbacks, none may have a conversation that can be rated.
        if name != "POST /reward" and (name != "POST /feedback" or examples >= 16):
            assert statuses[200] > (examples // 8 if name.startswith("POST /v1/") else 0), statuses
    else:
        assert not statuses[200], (statuses, accepted)
