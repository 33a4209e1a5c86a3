"""`/v1/responses` with OpenAI's client: the same text as a chat completion, as a whole and as events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from helpers.chat_models import chain, random_policy, scripted_policy
from helpers.servers import HTTP, Server, alone, serving

from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def test_a_whole_response(client: openai.OpenAI, bundle: PolicyBundle) -> None:
    answer = client.responses.create(model="tiny", input="What is blue?", temperature=0, max_output_tokens=12)
    assert answer.output_text == alone(bundle, "What is blue?", Sampling(12, 0.0))
    assert (answer.status, answer.object, answer.model, answer.store) == ("incomplete", "response", "tiny", False)
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage
    prompt = len(bundle.tokenizer.encode("What is blue?")) + 3
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (prompt, 12)
    assert answer.usage.total_tokens == prompt + 12
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")  # type: ignore[union-attr]


def test_a_stream_of_events(client: openai.OpenAI, bundle: PolicyBundle) -> None:
    events = list(
        client.responses.create(model="tiny", input="What is blue?", temperature=0, max_output_tokens=12, stream=True)
    )
    text = alone(bundle, "What is blue?", Sampling(12, 0.0))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == text
    assert last.response.usage
    assert last.response.usage.output_tokens == 12
    assert last.response.output[0].id == events[4].item_id  # type: ignore[union-attr]


def test_the_stream_helper_of_the_client(byte_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with serving(scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"Helo wrd!"))), tmp_path / "f") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client.responses.stream(model="tiny", input="Hi") as stream:
            final = stream.get_final_response()
        assert (final.output_text, final.status, final.incomplete_details) == ("Helo wrd!", "completed", None)


def test_messages_and_instructions(client: openai.OpenAI, server: Server) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "And?")]
    chat = [{"role": "system", "content": "Be brief.\n\nBe kind."}]
    chat += [{"role": role, "content": text} for role, text in turns]
    options = {"messages": chat, "temperature": 0, "max_tokens": 6}
    expected = HTTP.post(f"{server.url}/v1/chat/completions", json=options).json()
    kinds = {"user": "input_text", "assistant": "output_text"}
    items: list[Any] = [{"role": "developer", "content": "Be kind."}]
    items += [{"role": role, "content": [{"type": kinds[role], "text": text}]} for role, text in turns]
    answer = client.responses.create(
        model="tiny", instructions="Be brief.", input=items, temperature=0, max_output_tokens=6
    )
    assert answer.output_text == expected["choices"][0]["message"]["content"]
    assert answer.usage
    assert answer.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert answer.instructions == "Be brief."


def test_an_input_that_does_not_fit(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="word " * 500, max_output_tokens=5)
    assert answer.model_extra
    assert answer.model_extra["rlchat"]["cut_tokens"] > 300
    with pytest.raises(openai.BadRequestError, match="does not fit into the model's context of 128 tokens"):
        client.responses.create(model="tiny", input="word " * 500, truncation="disabled")


def test_an_error_of_the_engine(tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = random_policy(tokenizer)
    with serving(bundle, tmp_path / "f") as server:

        def broken(*_: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(bundle.model, "forward", broken)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="generation failed"):
            client.responses.create(model="tiny", input="Hi")
        last = list(client.responses.create(model="tiny", input="Hi", stream=True))[-1]
        assert last.type == "response.failed"
        assert last.response.error
        assert last.response.error.message == "generation failed: see the server's log"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "input: Field required", "input"),
        ({"input": []}, "input: ", "input"),
        ({"input": " "}, "input: must end with a user message that is not empty", "input"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input: item 0 is 'item_reference': only messages",
            "input",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "only text parts are supported, got 'input_image'",
            "input.0.content",
        ),
        (
            {"input": "a", "previous_response_id": "r"},
            "previous_response_id is not supported by this server: this",
            None,
        ),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools is not supported by this server: remove it", None),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text is not supported by this server", None),
        ({"input": "a", "background": True}, "background is not supported by this server: remove it, or set", None),
        ({"input": "a", "reasoning": {"effort": "high"}}, "reasoning is not supported by this server", None),
        ({"input": "a", "max_tokens": 3}, "max_tokens is not supported by this server: use max_output_tokens", None),
    ],
    ids=str,
)
def test_invalid_requests(server: Server, body: dict[str, Any], message: str, param: str | None) -> None:
    answer = HTTP.post(f"{server.url}/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == (param or error["message"].split(" ", 1)[0])
