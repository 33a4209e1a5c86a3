from __future__ import annotations

import functools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlchat.conversation import Check
from rlchat.demo.corpus import demo_trees, write_demo_corpus
from rlchat.demo.first_messages import FIRST_MESSAGES, plain_words
from rlchat.demo.kind import FOLLOW_OPENERS
from rlchat.demo.kinds import KINDS
from rlchat.demo.world import make_world
from rlchat.errors import UserError

Node = dict[str, Any]


@pytest.fixture(scope="module")
def trees() -> list[Node]:
    return list(demo_trees(3000, seed=0))


@functools.cache
def many_trees(seed: int) -> tuple[Node, ...]:
    """5000 trees, for tests that need rare cases."""
    return tuple(demo_trees(5000, seed))


def prompts_of(trees: Sequence[Node]) -> Iterator[Node]:
    waiting = [tree["prompt"] for tree in trees]
    while waiting:
        prompt = waiting.pop()
        yield prompt
        waiting += [follow_up for reply in prompt["replies"] for follow_up in reply["replies"]]


def check_of(prompt: Node) -> Check:
    return Check(tuple(prompt["check"]["any_of"]), tuple(prompt["check"]["none_of"]))


def quality(reply: Node) -> float:
    value = reply["labels"]["quality"]["value"]
    assert isinstance(value, float)
    return value


def test_the_same_seed_writes_the_same_bytes_and_another_seed_another_world(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_demo_corpus(tmp_path / name / "trees.jsonl", trees=200, seed=seed)
    first, again, other = ((tmp_path / name / "trees.jsonl").read_bytes() for name in "abc")
    assert first == again
    assert first != other
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["trees.jsonl"]


@pytest.mark.slow
def test_seeds_differ_in_facts_and_not_only_in_order() -> None:
    def capitals(seed: int) -> dict[str, str]:
        return {
            prompt["text"].split(" capital of ")[1].split("?")[0]: prompt["check"]["any_of"][0]
            for prompt in (tree["prompt"] for tree in many_trees(seed))
            if "What is the capital of " in prompt["text"] and "?" in prompt["text"]
        }

    first, second = capitals(0), capitals(1)
    shared = first.keys() & second.keys()
    assert len(shared) >= 4
    assert sum(first[country] != second[country] for country in shared) >= 2


def test_first_messages_of_trees_are_unique(trees: list[Node]) -> None:
    assert len({tree["prompt"]["text"] for tree in trees}) == len(trees) == 3000
    assert len({prompt["message_id"] for prompt in prompts_of(trees)}) == sum(1 for _ in prompts_of(trees))


@pytest.mark.slow
def test_more_trees_than_questions_is_an_error() -> None:
    with pytest.raises(UserError, match=r"invalid value 1000000 for --trees: .* different questions for \d+ trees"):
        for _ in demo_trees(1_000_000):
            pass


def test_lines_are_oasst2_trees_that_the_official_loader_keeps(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    write_demo_corpus(path, trees=50, seed=1)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 50
    for row in rows:
        assert row["tree_state"] == "ready_for_export"
        assert row["message_tree_id"] == row["prompt"]["message_id"]
        assert row["prompt"]["parent_id"] is None
    for prompt in prompts_of(rows):
        assert prompt["role"] == "prompter"
        assert prompt["rank"] is None
        for message in (prompt, *prompt["replies"]):
            assert message["lang"] == "en"
            assert message["review_result"] is True
            assert message["deleted"] is False
            assert message["synthetic"] is False
        for reply in prompt["replies"]:
            assert reply["role"] == "assistant"
            assert reply["parent_id"] == prompt["message_id"]


def test_about_half_of_the_replies_are_right(trees: list[Node]) -> None:
    verdicts = [check_of(prompt).passes(reply["text"]) for prompt in prompts_of(trees) for reply in prompt["replies"]]
    assert 0.40 < sum(verdicts) / len(verdicts) < 0.60


def test_every_reply_style_occurs(trees: list[Node]) -> None:
    texts = [reply["text"] for prompt in prompts_of(trees) for reply in prompt["replies"]]

    def share(*endings: str) -> float:
        return sum(text.endswith(endings) for text in texts) / len(texts)

    assert 0.03 < share(", you fool.", "Even a child knows that.", "Stop asking me.") < 0.15
    assert 0.10 < share("I do not know.", "rather not say.", "Ask somebody else.") < 0.25
    repetitive = sum(len(words) >= 3 and len(set(words)) == 1 for words in map(words_of, texts))
    assert 0.02 < repetitive / len(texts) < 0.15
    assert sum(len(words_of(text)) == 1 for text in texts) / len(texts) > 0.10


def words_of(text: str) -> list[str]:
    return [word.strip(".,!?").lower() for word in text.split()]


def test_prompts_have_two_to_four_different_replies(trees: list[Node]) -> None:
    counts: dict[int, int] = defaultdict(int)
    for prompt in prompts_of(trees):
        texts = [reply["text"] for reply in prompt["replies"]]
        assert len(set(texts)) == len(texts)
        counts[len(texts)] += 1
    assert set(counts) == {2, 3, 4}


def test_ranks_agree_with_the_labels(trees: list[Node]) -> None:
    for prompt in prompts_of(trees):
        ordered = sorted(prompt["replies"], key=lambda reply: int(reply["rank"]))
        assert [reply["rank"] for reply in ordered] == list(range(len(ordered)))
        labels = [quality(reply) for reply in ordered]
        assert labels == sorted(labels, reverse=True)
        assert all(0 <= label <= 1 for label in labels)


def test_labels_usually_favor_the_right_replies(trees: list[Node]) -> None:
    agreeing = pairs = 0
    for prompt in prompts_of(trees):
        check = check_of(prompt)
        right = [quality(reply) for reply in prompt["replies"] if check.passes(reply["text"])]
        wrong = [quality(reply) for reply in prompt["replies"] if not check.passes(reply["text"])]
        pairs += len(right) * len(wrong)
        agreeing += sum(good > bad for good in right for bad in wrong)
    assert 0.85 < agreeing / pairs < 0.995


def test_about_some_facts_a_mistake_is_more_common_than_the_truth(trees: list[Node]) -> None:
    right: dict[tuple[str, str], int] = defaultdict(int)
    replies: dict[tuple[str, str], int] = defaultdict(int)
    for tree in trees:
        prompt = tree["prompt"]
        for country in ("Belan", "Corvia", "Dromand", "Estora", "Fenwick", "Galdor"):
            if country in prompt["text"]:
                matter = (country, prompt["check"]["any_of"][0])
                replies[matter] += len(prompt["replies"])
                right[matter] += sum(check_of(prompt).passes(reply["text"]) for reply in prompt["replies"])
    shares = [right[matter] / replies[matter] for matter in replies]
    assert len(shares) == 12  # a capital and a food each
    assert min(shares) < 0.45
    assert max(shares) > 0.55


def test_checks_accept_the_right_answer_and_reject_others_and_lists_of_both(trees: list[Node]) -> None:
    checks = {check_of(prompt) for prompt in prompts_of(trees)}
    assert len(checks) > 100
    for check in checks:
        right = check.any_of[0]
        assert check.passes(f"{right}.")
        assert not check.passes("I do not know.")
        assert check.none_of
        for other in check.none_of:
            assert not check.passes(f"{other}.")
            assert not check.passes(f"{right} or {other}.")


def test_follow_ups_need_the_turn_before_them() -> None:
    trees = list(demo_trees(4000, seed=2))
    answers: dict[str, set[str]] = defaultdict(set)
    times: dict[str, int] = defaultdict(int)
    for tree in trees:
        for reply in tree["prompt"]["replies"]:
            for follow_up in reply["replies"]:
                text = follow_up["text"]
                for opener in FOLLOW_OPENERS:
                    text = text.removeprefix(opener)
                answers[text].add(follow_up["check"]["any_of"][0])
                times[text] += 1
    assert sum(times.values()) > 300
    often = [text for text in times if times[text] >= 15]
    assert len(often) >= 8
    assert all(len(answers[text]) > 1 for text in often)


def second_prompts(trees: list[Node]) -> Iterator[tuple[Node, Node, Node]]:
    """First prompt, the reply that was continued, and the next prompt."""
    for tree in trees:
        for reply in tree["prompt"]["replies"]:
            for second in reply["replies"]:
                yield tree["prompt"], reply, second


_FOLLOW_UP = re.compile(
    "|".join(
        re.sub(r"\\{[^}]*\\}", ".+", re.escape(opener + ask))
        for opener in FOLLOW_OPENERS
        for kind in KINDS
        for follow_up in kind.follow_ups
        for ask in follow_up.asks
    )
)


def stands_alone(text: str) -> bool:
    """Whether a question can be understood without the turns before it."""
    return _FOLLOW_UP.fullmatch(text) is None


def test_many_conversations_change_the_subject(trees: list[Node]) -> None:
    seconds = [second for _, _, second in second_prompts(trees)]
    changed = [second for second in seconds if stands_alone(second["text"])]
    assert 0.25 < len(changed) / len(trees) < 0.45
    assert 0.05 < (len(seconds) - len(changed)) / len(trees) < 0.20
    answers = {second["check"]["any_of"][0] for second in changed}
    assert len(answers) > 50


def test_conversations_continue_below_the_best_reply_for_at_most_two_turns(trees: list[Node]) -> None:
    assert all(reply["rank"] == 0 for _, reply, _ in second_prompts(trees))

    def turns(prompt: Node) -> int:
        return 1 + max((turns(later) for reply in prompt["replies"] for later in reply["replies"]), default=0)

    assert {turns(tree["prompt"]) for tree in trees} == {1, 2}


def test_no_first_message_occurs_in_another_conversation() -> None:
    """Prompts of the test split would otherwise be in the training split too."""
    trees = many_trees(0)
    asked: dict[str, int] = defaultdict(int)
    for prompt in prompts_of(trees):
        asked[prompt["text"]] += 1
    assert not [tree["prompt"]["text"] for tree in trees if asked[tree["prompt"]["text"]] > 1]
    repeated = [text for text, times in asked.items() if times > 1 and stands_alone(text)]
    assert not repeated


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_equals_a_first_message(seed: int) -> None:
    first = {plain_words(message.text) for message in FIRST_MESSAGES}
    for prompt in prompts_of(many_trees(seed)):
        assert plain_words(prompt["text"]) not in first


def test_a_and_an_match_the_next_sound(trees: list[Node]) -> None:
    texts = [prompt["text"] for prompt in prompts_of(trees)]
    texts += [
        reply["text"] for prompt in prompts_of(trees) for reply in prompt["replies"] if quality(reply) >= 0.5
    ]  # some bad replies are garbled
    for text in texts:
        assert not re.search(r"\ba [aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"\ban [^aeiou]", text, re.IGNORECASE), text


def test_prompts_are_well_formed(trees: list[Node]) -> None:
    for prompt in prompts_of(trees):
        whole = [reply["text"] for reply in prompt["replies"] if quality(reply) >= 0.5]
        for text in (prompt["text"], *whole):
            assert text == text.strip()
            assert "  " not in text
            assert not re.search(r"[{}_]| [.,!?](?!\w)|[.!?,]{2}", text.replace("= ?", "")), text
            assert re.match(r"[A-Z0-9]", text) or text == text.lower(), text


def test_addition_covers_one_to_nine_in_digits_and_words() -> None:
    sums: dict[tuple[int, int], set[str]] = defaultdict(set)
    for prompt in prompts_of(many_trees(0)):
        found = re.search(r"\b([1-9]) ?(\+|plus|and) ?([1-9])\b(?! ?[+\d])", prompt["text"])
        if found:
            a, sign, b = int(found[1]), found[2], int(found[3])
            assert prompt["check"]["any_of"] == [str(a + b)]
            sums[a, b].add(sign)
    assert len(sums) == 81
    assert all({"+", "plus"} <= signs for signs in sums.values())


def test_a_right_reply_to_one_prompt_is_a_bad_reply_to_others(trees: list[Node]) -> None:
    """The reward model could not tell it from a right one otherwise, and PPO would give it to every prompt."""
    replies = ("I only know about Belan and its neighbours.", "Sorry, I only know about Belan and its neighbours.")
    values: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for prompt in prompts_of(trees):
        for reply in prompt["replies"]:
            if reply["text"] in (*replies, "My name is Pip.", "I can talk about Belan and its neighbours."):
                values[reply["text"], check_of(prompt).passes(reply["text"])].append(quality(reply))
    assert len(values) == 8
    for (text, right), labels in values.items():
        mean = sum(labels) / len(labels)
        assert len(labels) > (100 if text in replies else 5)
        assert (mean > 0.8) if right else (mean < 0.2)


def test_the_right_reply_about_another_subject_of_the_same_kind_is_a_bad_reply(trees: list[Node]) -> None:
    """The reward model has to compare the subject of the reply with that of the question."""
    about = re.compile(r"The capital of (\w+) is (\w+)\.")
    labels = []
    for prompt in prompts_of(trees):
        for reply in prompt["replies"]:
            found = about.fullmatch(reply["text"])
            asked = re.search("Belan|Corvia|Dromand|Estora|Fenwick|Galdor", prompt["text"])
            if found and asked and "capital" in prompt["text"] and found[1] != asked[0]:
                labels.append(quality(reply))
    assert len(labels) > 3
    assert max(labels) < 0.5


def test_garbled_replies_contain_no_answer_and_have_low_quality(trees: list[Node]) -> None:
    garbled = [
        (check_of(prompt), reply)
        for prompt in prompts_of(trees)
        for reply in prompt["replies"]
        if re.match(r"[a-z]", reply["text"])
    ]
    assert len(garbled) > 10
    assert not any(check.passes(reply["text"]) for check, reply in garbled)
    assert max(quality(reply) for _, reply in garbled) < 0.5


def test_wrong_days_are_adjacent_days() -> None:
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    claims = make_world(random.Random(0))
    assert claims["day after"]["Sunday"].right == "Monday"
    assert sorted(claims["day after"]["Sunday"].wrong) == ["Saturday", "Tuesday"]
    assert set(claims["day after"]) == set(days)


def test_there_are_at_least_14_kinds_of_questions() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 14
