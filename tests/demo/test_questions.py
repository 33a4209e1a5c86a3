"""Which questions are drawn, and how their texts are put together."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rlchat.demo.outside import outside_prompts
from rlchat.demo.questions import Questions, fill, joined
from rlchat.demo.world import make_world


def test_a_comma_is_followed_by_lower_case_except_for_names_and_i() -> None:
    assert joined("Hi, ", "Who are you?") == "Hi, who are you?"
    assert joined("Hi! ", "Who are you?") == "Hi! Who are you?"
    assert joined("So, ", "I need help.") == "So, I need help."
    assert joined("", "Who are you?") == "Who are you?"


def test_gaps_are_filled_with_the_right_article_and_a_capital() -> None:
    assert fill("{x} is a {a}.", "the apple", "orange") == "The apple is an orange."
    assert fill("{w[0]}+{w[2]}", "3 + 4") == "3+4"
    assert fill("A {x} lives in a {a}.", "owl", "tree") == "An owl lives in a tree."


def questions(seed: int = 0) -> Questions:
    rng = random.Random(seed)
    return Questions(make_world(rng), rng)


def test_every_text_is_drawn_once_and_then_none() -> None:
    pool = questions()
    texts = []
    while (question := pool.draw()) is not None:
        texts.append(question.text)
    assert len(set(texts)) == len(texts) > 10_000


def test_in_the_middle_of_a_conversation_only_greetings_say_hello() -> None:
    pool = questions()
    greetings = 0
    for _ in range(2000):
        question = pool.draw()
        assert question is not None
        text = question.after_another()
        if question.kind.greets:
            greetings += 1
            assert text == question.text
        else:
            assert not text.lower().startswith(("hi", "hello", "hey")), text
    assert greetings > 20


@pytest.mark.parametrize("seed", [0, 1])
def test_prompts_about_the_outside_world_are_diverse_and_complete(seed: int) -> None:
    prompts = outside_prompts(random.Random(seed))
    assert len(set(prompts)) == len(prompts) > 1500
    assert not any("{" in prompt or "}" in prompt for prompt in prompts)
    first_words = Counter(" ".join(prompt.split()[:2]) for prompt in prompts)
    assert len(first_words) > 100
    assert max(first_words.values()) < 0.15 * len(prompts)


def test_prompts_about_the_outside_world_do_not_ask_about_the_demos_world() -> None:
    world = make_world(random.Random(0))
    for kind in ("capital", "food", "job", "plural", "opposite"):
        for subject in world[kind]:
            for prompt in outside_prompts(random.Random(0)):
                asks_as_the_demo = prompt.startswith(("What is the", "Where does", "What sound", "What does"))
                assert not (asks_as_the_demo and prompt.endswith(f" {subject}?")), prompt
