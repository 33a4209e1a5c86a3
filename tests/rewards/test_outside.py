"""Rewards from outside: checkable answers, plain functions, and a real HTTP service in this process."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.reward_service import Answer, Service, lengths

from rlchat.conversation import Check, Conversation, Message
from rlchat.errors import UserError
from rlchat.rewards import FactorError, FunctionReward, HTTPReward, Reply, ReplyFactor, Reward, Verified

ASKED = Conversation((Message("user", "What is 6 × 7?"),), check=Check(("42",), kind="number"))
SLOW = "(a|aa)+$"  # tries every way to write 100 letters as ones and twos
UNCHECKED = Conversation((Message("user", "Hello"),))


def reply(text: str) -> Reply:
    return Reply(text, len(text), True)


# ---- Verified --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (Check(("Paris",)), ["It is paris!", "Paris"], ["Parisian", "Rome", ""]),
        (
            Check(("New York",), ("Boston",)),
            ["new york, of course"],
            ["new, york city or Boston: New York", "york new"],
        ),
        (Check(("Paris",), kind="exact"), ["Paris", " paris. ", "PARIS"], ["It is Paris", "Paris!", "paris.."]),
        (Check(("a b",), kind="exact"), ["a  b\n"], ["ab"]),
        (
            Check(("42",), kind="number"),
            ["42", "6 × 7 = 42.", "42.0", "$42", "4.2e1 km"],
            ["43", "42 or 43", "", "-42"],
        ),
        (Check(("-3", "1,000"), kind="number"), ["so -3", "−3", "1000", "1,000.0"], ["5-3", "3", "x1000", "1,0000"]),
        (Check(("0.5",), (), "number", 0.01), [".5", "0.509", "x = .49"], ["0.52", "5"]),
        (Check(("0.3",), kind="number"), [str(0.1 + 0.2)], ["0.3000001"]),
        (Check((r"^\d+ apples?$",), kind="regex"), ["1 apple", "12 apples"], ["apples", "1 Apple"]),
        (Check((r"(?i)yes",), (r"\?",), "regex"), ["Yes."], ["Yes?", "no"]),
    ],
)
def test_verified_by_kind_of_check(check: Check, right: list[str], wrong: list[str]) -> None:
    prompt = Conversation(ASKED.messages, check=check)
    texts = right + wrong
    scores = Verified()([prompt] * len(texts), [reply(text) for text in texts])
    assert dict(zip(texts, scores.tolist(), strict=True)) == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"v_{e}=5", r"a{s}b", r"x{2}", r"x{1,2}y", r"x{,2}y", r"x{1,}", r"[{e}]", r"[]{e}]", r"[^]{e}]"),
        *(r"\{e\}", r"(cat){e<=1}", r"\\{i}", r"\N{COMMA}", r"{", r"x{e", r"[\]{e}]{d}"),
    ],
)
def test_patterns_mean_what_they_mean_in_re(pattern: str) -> None:
    texts = [
        "v_{e}=5",
        "v9=5",
        "v=5",
        "a{s}b",
        "acb",
        "x",
        "xx",
        "xxy",
        "y",
        "{",
        "e",
        "}",
        "]",
        "{e}",
        ",",
        "",
        "cut",
        "cat",
    ]
    texts += ["x{e", "\\{i}", "]{d}", "cat{e<=1}", "x{,2}y"]
    for text in texts:
        assert Check((pattern,), kind="regex").passes(text) == bool(re.search(pattern, text)), text


@pytest.mark.parametrize("check", [Check((SLOW,), kind="regex"), Check(("a",), (SLOW,), "regex")])
def test_a_pattern_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    monkeypatch.setattr("rlchat.conversation.REGEX_SECONDS", 0.05)
    prompt = Conversation(ASKED.messages, check=check)
    replies = [reply("a" * 100 + "!"), reply("b"), reply("a" * 100 + "!")]
    complaint = "the check '(a|aa)+$' of the prompt 'What is 6 × 7?' took more than 0.05 s on a response, which"
    with pytest.warns(UserWarning, match=re.escape(complaint)):
        assert Verified()([prompt] * 3, replies).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(TimeoutError, match=r"^\(a\|aa\)\+\$$"):
        check.passes(replies[0].text)


def test_verified_counts_prompts_without_a_check(caplog: pytest.LogCaptureFixture) -> None:
    factor = Verified(weight=2.0, wrong=-0.5)
    prompts = [ASKED, ASKED, UNCHECKED]
    replies = [reply("42"), reply("41"), reply("42")]
    for _ in range(2):
        assert Reward([factor]).breakdown(prompts, replies)["verified"].tolist() == [2.0, -1.0, 0.0]
    assert [record.getMessage() for record in caplog.records] == [
        "reward factor 'verified': 1 of 3 prompts have no `answer` or `check` in the data, and their responses score 0"
    ]
    assert [factor.unavailable(prompt) for prompt in prompts] == [None, None, "the prompt has no answer to check"]
    assert factor.describe()["init_args"] == {"weight": 2.0, "wrong": -0.5, "expect_checks": True}


def test_verified_is_silent_where_prompts_without_a_check_are_expected(caplog: pytest.LogCaptureFixture) -> None:
    reward = Reward([Verified(expect_checks=False)])
    assert reward([ASKED, UNCHECKED], [reply("42"), reply("42")]).tolist() == [1.0, 0.0]
    assert caplog.records == []


# ---- functions -------------------------------------------------------------------------------------------------------

FUNCTIONS = """
def polite(prompt, reply):
    return "please" in reply.text

def length(text):
    return len(text)

def word(prompt, reply):
    return "good"

def fails(prompt, reply):
    return 1 / 0

number = 3
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions_for_a_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("functions")
def test_a_function_by_import_path() -> None:
    factor = FunctionReward("functions_for_a_test.polite", weight=0.5)
    found = Reward([factor]).breakdown([ASKED, ASKED], [reply("please"), reply("no")])
    assert {name: scores.tolist() for name, scores in found.items()} == {"polite": [0.5, 0.0]}
    described = factor.describe()
    assert described == {
        "class_path": "rlchat.rewards.FunctionReward",
        "init_args": {"function": "functions_for_a_test.polite", "weight": 0.5, "name": "polite"},
    }
    assert FunctionReward(**described["init_args"]).describe() == described
    assert list(Reward([FunctionReward("functions_for_a_test.polite", name="manners")]).factors) == ["manners"]


def test_a_function_itself_is_a_factor() -> None:
    def loud(prompt: Conversation, reply: Reply) -> float:
        return float(reply.text.isupper())

    assert Reward([loud]).breakdown([ASKED], [reply("HI")])["loud"].tolist() == [1.0]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("polite", "expected an import path such as my_rewards.polite"),
        ("no_such_module_here.polite", "there is no module no_such_module_here; put its file in the folder where"),
        ("functions_for_a_test.rude", "functions_for_a_test has no rude"),
        ("functions_for_a_test.number", "functions_for_a_test.number is not a function"),
        ("rlchat.rewards.TooShort", "not a function; a class is set by class_path"),
        (
            "functions_for_a_test.length",
            r"factor 'length': functions_for_a_test.length cannot be called with \(prompt,",
        ),
    ],
)
@pytest.mark.usefixtures("functions")
def test_a_function_that_cannot_be_used(path: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        FunctionReward(path)


@pytest.mark.usefixtures("functions")
def test_a_failing_function_is_named() -> None:
    with pytest.raises(
        FactorError, match=r"reward factor 'word' returned 'good' for the response 'hi': score\(\) must"
    ):
        Reward([FunctionReward("functions_for_a_test.word")])([ASKED], [reply("hi")])
    with pytest.raises(FactorError) as error:
        Reward([FunctionReward("functions_for_a_test.fails")])([ASKED], [reply("hi")])
    assert str(error.value) == (
        "reward factor 'fails' (functions_for_a_test.fails) failed: ZeroDivisionError: division by zero; "
        "see line 12 of functions_for_a_test.py"
    )
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert [line.strip() for line in error.value.details.splitlines()][2] == "return 1 / 0"


def test_a_user_error_of_any_factor_names_it() -> None:
    class Refuses(ReplyFactor):
        def score(self, prompt: Conversation, reply: Reply) -> float:
            raise UserError("no key is set")

    with pytest.raises(FactorError, match=r"^reward factor 'refuses': no key is set$"):
        Reward([Refuses()])([ASKED], [reply("hi")])


# ---- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    return


def test_a_service_scores_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORING_TOKEN", "secret")
    with Service(lengths) as service:
        factor = HTTPReward(service.url, weight=0.5, batch_size=2, token_env="SCORING_TOKEN")
        found = Reward([factor]).breakdown([ASKED, UNCHECKED, ASKED], [reply("a"), reply("bb"), reply("ccc")])
        assert found["http_reward"].tolist() == [0.5, 1.0, 1.5]
        assert factor([], []).shape == (0,)
    assert [len(body["items"]) for body in service.requests] == [2, 1]  # none for no responses
    assert service.requests[0]["items"][1] == {
        "messages": [{"role": "user", "content": "Hello"}],
        "response": "bb",
        "tokens": 2,
        "ended": True,
    }
    assert service.tokens == ["Bearer secret"] * 2
    assert "secret" not in json.dumps(factor.describe())
    assert HTTPReward(**factor.describe()["init_args"]).describe() == factor.describe()


def test_temporary_failures_are_retried() -> None:
    def third_time(number: int, body: dict[str, Any]) -> Answer:
        return (503, b"busy") if number < 3 else lengths(number, body)

    with Service(third_time) as service:
        assert HTTPReward(service.url, backoff=0.001)([ASKED], [reply("abc")]).tolist() == [3.0]
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("answer", "requests", "complaint"),
    [
        (
            (500, b"no\nmemory"),
            2,
            r"answered HTTP 500 Internal Server Error \(no memory\) after 2 attempts; see the log of the service, or",
        ),
        ((429, b""), 2, r"answered HTTP 429 Too Many Requests after 2 attempts; raise backoff or retries$"),
        (
            (404, b""),
            1,
            r"answered HTTP 404 Not Found; set url to the address and path at which the service takes POST",
        ),
        ((401, b""), 1, r"answered HTTP 401 Unauthorized; set token_env to the name of an environment variable with"),
        ((413, b""), 1, r"answered HTTP 413 .*; lower batch_size"),
        (
            (422, b"bad"),
            1,
            r'answered HTTP 422 .*; the service must take {"items": \[{"messages": \[...\], "response": ',
        ),
        ((302, b""), 1, r"answered HTTP 302 Found; redirects are not followed, set url to /elsewhere$"),
        (
            (200, b"<html>hello"),
            1,
            r'answered \'<html>hello\', which is not JSON; expected {"scores": \[0.5, -1\]} with 2 finite numbers$',
        ),
        ((200, b"\xff\xfe"), 1, "which is not JSON"),
        ((200, b"[1, 2]"), 1, r"answered '\[1, 2\]'; expected {\"scores\""),
        ((200, b'{"scores": 3}'), 1, 'expected {"scores"'),
        ((200, b'{"scores": [1]}'), 1, 'answered 1 scores for 2 responses; expected {"scores": '),
        ((200, b'{"scores": [1, 2, 3]}'), 1, "answered 3 scores for 2 responses"),
        (
            (200, b'{"scores": [1, NaN]}'),
            1,
            r"answered NaN as score 1; expected {\"scores\": \[0.5, -1\]} with 2 finite numbers",
        ),
        ((200, b'{"scores": [1, null]}'), 1, "answered null as score 1; expected {"),
        ((200, b'{"scores": ["1", 2]}'), 1, 'answered "1" as score 0; expected {"scores"'),
        ((200, b'{"scores": [true, 2]}'), 1, "answered true as score 0"),
        ((200, b'{"scores": [1, 1' + b"0" * 400 + b"]}"), 1, "as score 1; expected {"),
    ],
)
def test_a_wrong_answer_names_the_factor(answer: Answer, requests: int, complaint: str) -> None:
    with (
        Service(lambda *_: answer) as service,
        pytest.raises(FactorError, match=rf"^reward factor 'toxicity': {service.url} .*{complaint}"),
    ):
        HTTPReward(service.url, retries=1, backoff=0.001, name="toxicity")([ASKED] * 2, [reply("a"), reply("b")])
    assert len(service.requests) == requests


def test_a_service_that_does_not_answer() -> None:
    complaint = (
        r"^reward factor 'http_reward': http://127.0.0.1:\d+/score did not answer within 0.05 s after 2 attempts; "
        r"raise timeout, or lower batch_size \(64 responses per request\)$"
    )
    with Service(lambda *_: None) as service, pytest.raises(FactorError, match=complaint):
        HTTPReward(service.url, timeout=0.05, retries=1, backoff=0)([ASKED], [reply("a")])


def test_a_service_that_is_down() -> None:
    with Service(lengths) as service:
        pass
    with pytest.raises(
        FactorError,
        match=r"'http_reward': .* cannot be reached \(.*refused\) after 1 attempt; start the service, or correct url$",
    ):
        HTTPReward(service.url, retries=0)([ASKED], [reply("a")])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": "file:///etc/passwd"}, "invalid url"),
        ({"url": "localhost:8000"}, "invalid url"),
        ({"url": "http://me:pw@host/"}, "holds a password"),
        ({"timeout": 0}, "timeout 0 must be above 0"),
        ({"timeout": math.inf}, "timeout inf"),
        ({"retries": -1}, "retries -1"),
        ({"batch_size": 0}, "batch_size"),
        ({"token_env": "NO_SUCH_VARIABLE_HERE"}, "variable NO_SUCH_VARIABLE_HERE, which token_env names, is not set"),
    ],
)
def test_options_of_a_service_that_cannot_work(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        HTTPReward(**{"url": "http://localhost:1/", **options})
