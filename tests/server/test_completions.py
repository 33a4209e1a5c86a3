"""`/v1/completions` with OpenAI's client: raw text, token ids, echo, log-probs as lm_eval reads them."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
import torch
from helpers.servers import HTTP, Server

from rlchat.models.model_file import PolicyBundle
from rlchat.tokenizer.chat_format import MARKERS


def opening(bundle: PolicyBundle) -> int:
    """The marker that opens a response; it precedes every prompt."""
    return bundle.tokenizer.base_size + MARKERS.index("<|assistant|>")


@torch.no_grad()
def logprob_table(bundle: PolicyBundle, ids: list[int]) -> torch.Tensor:
    """The log-probs [len(ids) + 1, vocabulary] of the tokens at each place of a prompt and after it."""
    row = torch.tensor([[opening(bundle), *ids]])
    return bundle.model.logits(bundle.model(row, torch.ones_like(row, dtype=torch.bool))[0]).log_softmax(-1)


def greedy(bundle: PolicyBundle, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logprob_table(bundle, ids)[-1].argmax()))
    return ids[-count:]


def test_text_is_continued(client: openai.OpenAI, bundle: PolicyBundle) -> None:
    ids = bundle.tokenizer.encode("Once upon")
    expected = greedy(bundle, ids, 8)
    assert bundle.tokenizer.end_id not in expected
    answer = client.completions.create(model="tiny", prompt="Once upon", temperature=0, max_tokens=8)
    (choice,) = answer.choices
    assert choice.text == bundle.tokenizer.decode(expected)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.object == "text_completion"
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids) + 1, 8)
    of_ids = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=8)
    assert of_ids.choices == answer.choices
    echoed = client.completions.create(model="tiny", prompt="Once upon", temperature=0, max_tokens=8, echo=True)
    assert echoed.choices[0].text == "Once upon" + choice.text
    assert client.completions.create(model="tiny", prompt="Once upon").usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_a_stream_has_the_same_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "max_tokens": 8, "logprobs": 1}
    whole = client.completions.create(**options, echo=True).choices[0]
    chunks = list(client.completions.create(**options, echo=True, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == whole.text
    assert choices[0].text == "Once upon"
    assert len(choices) > 4
    assert choices[-1].finish_reason == "length"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 8
    assert whole.logprobs
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed = [value for choice in choices for value in getattr(choice.logprobs, name)]
        assert streamed == getattr(whole.logprobs, name), name


def test_several_prompts_and_choices_keep_their_order(client: openai.OpenAI) -> None:
    prompts = ["Once", "A cat sat on", "Hi"]

    def texts(prompt: str | list[str], **more: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, seed=3, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    together = texts(prompts, temperature=1)
    assert together == [text for prompt in prompts for text in texts(prompt, temperature=1)]
    assert len(set(together)) > 3


def test_lm_eval_scores_choices(client: openai.OpenAI, bundle: PolicyBundle) -> None:
    """The request and the arithmetic of lm_eval's local-completions: batches of ids, echo, one new token."""
    contexts, continuations = ["The cat sat on the", "Two and two"], [" mat.", " is four"]
    encode = bundle.tokenizer.encode
    rows = [encode(c) + encode(k) for c, k in zip(contexts, continuations, strict=True)]
    best = [*rows[0][: len(encode(contexts[0]))], *greedy(bundle, encode(contexts[0]), 3)]
    rows.append(best)
    lengths = [len(encode(contexts[0])), len(encode(contexts[1])), len(encode(contexts[0]))]
    answer = client.completions.create(
        model="tiny", prompt=rows, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    ).model_dump()
    scores = []
    for choice, length in zip(answer["choices"], lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        scores.append((sum(values), all(v == max(top.values()) for v, top in zip(values, tops, strict=True))))
    for (score, is_greedy), row, length in zip(scores, rows, lengths, strict=True):
        table = logprob_table(bundle, row)
        expected = sum(float(table[place, row[place]]) for place in range(length, len(row)))
        assert score == pytest.approx(expected, abs=1e-4)
        assert is_greedy == all(int(table[place].argmax()) == row[place] for place in range(length, len(row)))
    assert [is_greedy for _, is_greedy in scores] == [False, False, True]


def test_a_prompt_is_scored_without_new_tokens(client: openai.OpenAI, bundle: PolicyBundle) -> None:
    text = "naïve 👩"  # tokens that are parts of a character have names of their own
    ids = bundle.tokenizer.encode(text)
    answer = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=3)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert choice.logprobs
    table = logprob_table(bundle, ids)
    assert choice.logprobs.token_logprobs == pytest.approx([float(table[i, t]) for i, t in enumerate(ids)], abs=1e-4)
    assert choice.logprobs.text_offset
    assert choice.logprobs.text_offset[0] == 0
    assert choice.logprobs.top_logprobs
    for place, top in enumerate(choice.logprobs.top_logprobs):
        best = table[place].topk(3).values.tolist()
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)
    assert any(name.startswith("bytes:\\x") for name in choice.logprobs.tokens or [])
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids) + 1, 0)


def test_a_prompt_of_ids_may_start_with_a_control_token(client: openai.OpenAI, bundle: PolicyBundle) -> None:
    ids = bundle.tokenizer.encode("Once upon")
    plain = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0]
    marked = client.completions.create(
        model="tiny", prompt=[opening(bundle), *ids], max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert plain.logprobs
    assert marked.logprobs
    assert marked.logprobs.tokens == ["<|assistant|>", *(plain.logprobs.tokens or [])]
    assert (marked.logprobs.token_logprobs or [])[0] is None  # nothing precedes it
    assert (marked.logprobs.token_logprobs or [])[1:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
    assert marked.text == "Once upon"


def test_probabilities_of_a_token_add_up(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hi", max_tokens=3, temperature=0, logprobs=20)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    for value, top in zip(logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True):
        assert value == max(top.values())  # temperature 0 takes the most likely token
        assert len(top) == 20
        assert 0 < sum(math.exp(one) for one in top.values()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "prompt: Field required", "prompt"),
        ({"prompt": 3}, "prompt: expected a string, a list of token ids, or a list of either", "prompt"),
        ({"prompt": ["a", 3]}, "prompt: expected a string, a list of token ids, or a list of either", "prompt"),
        ({"prompt": ["a"] * 65}, "prompt: expected at most 64 prompts, got 65", "prompt"),
        ({"prompt": [-1]}, "prompt: expected token ids from 0 to ", "prompt"),
        ({"prompt": "word " * 200}, "tokens do not fit into the model's context of 128 tokens", "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: expected at least 1, or 0 with echo", "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs: Input should be less than or equal to 20", "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported by this server: remove it", "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of is not supported by this server: remove it", "best_of"),
        ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs is not supported by this server: set echo", None),
    ],
    ids=str,
)
def test_invalid_requests(server: Server, body: dict[str, Any], message: str, param: str | None) -> None:
    answer = HTTP.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] == (param or "prompt_logprobs")
