"""Rewards: every factor against numbers worked out by hand, and properties that hold for any text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlchat import rewards
from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.rewards import (
    AppropriateLength,
    DistinctNgrams,
    Factor,
    MissingEnd,
    QualitySimilarity,
    Repetition,
    Reply,
    ReplyFactor,
    Reward,
    TooLong,
    TooShort,
    default_factors,
    distinct_n,
    words,
)
from rlchat.rewards.similarity import character_ngrams
from rlchat.rewards.similarity import chrf as chrf_of_ngrams


def chrf(reply: str, reference: str) -> float:
    return chrf_of_ngrams(character_ngrams(reply), character_ngrams(reference))


def prompt(*references: Message) -> Conversation:
    return Conversation((Message("user", "What is the capital of France?"),), references)


def human(text: str, quality: float | None = None, rank: int | None = None) -> Message:
    return Message("assistant", text, quality, rank)


def score(factor: Factor, text: str, *references: Message, ended: bool = True) -> float:
    return factor([prompt(*references)], [Reply(text, len(text), ended)]).item()


class ManyWords(ReplyFactor):
    def score(self, prompt: Conversation, reply: Reply) -> float:
        return float(len(words(reply.text)))


class Returns(Factor):
    """Returns the value that it was constructed with, valid or invalid."""

    def __init__(self, scores: object) -> None:
        super().__init__()
        self.scores = scores

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        return self.scores  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("... !?", []),
        ("Hello, World! It's a well-known fact.", ["hello", "world", "it's", "a", "well-known", "fact"]),
        ("'quoted' - dash_ed", ["quoted", "dash", "ed"]),
        ("巴黎是首都。", ["巴", "黎", "是", "首", "都"]),
        ("Tokyo東'京", ["tokyo", "東", "京"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("cafe\u0301", ["cafe\u0301"]),
        ("ok👍👍🏽", ["ok", "👍", "👍🏽"]),
        ("👨‍👩‍👧 ❤️", ["👨‍👩‍👧", "❤️"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_distinct_n_is_computed_over_the_corpus_but_not_across_texts() -> None:
    texts = ["a b a b", "a b"]
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)  # ab ba ab | ab: no "b a" across the two texts
    assert distinct_n(["a b", "c d"], 2) == 1.0
    assert distinct_n(["", "one"], 2) == 0.0
    assert distinct_n([], 1) == 0.0


def test_chrf_by_hand() -> None:
    assert chrf("hi", "hi") == 1.0
    assert chrf("", "abc") == chrf("abc", "") == chrf("", "") == chrf("abc", "xyz") == 0.0
    # Precisions 1, 1, 1; recalls 3/6, 2/5, 1/4, whose mean is 23/60; 2 (23/60) / (1 + 23/60) = 46/83.
    assert chrf("Par", "Paris.") == pytest.approx(46 / 83)
    # One "a" of three is matched, because the reference has only one. Precision 1/3 and 0, recall 1/2 and 0.
    assert chrf("aaa", "ab") == pytest.approx(2 * (1 / 6) * (1 / 4) / (1 / 6 + 1 / 4))


def test_chrf_agrees_with_sacrebleu() -> None:
    # sacrebleu 2: CHRF(beta=1).sentence_score(reply, [reference]).score / 100
    assert chrf("Paris is the capital of France.", "The capital of France is Paris.") == pytest.approx(
        0.7424971405406189
    )
    assert chrf("巴黎", "巴黎是法国的首都") == pytest.approx(0.3283582089552239)


def test_quality_of_a_copy_is_the_label_on_a_scale_from_minus_one_to_one() -> None:
    quality = QualitySimilarity()
    assert score(quality, "Paris.", human("Paris.", quality=1.0)) == pytest.approx(1.0)
    assert score(quality, "Paris.", human("Paris.", quality=0.0)) == pytest.approx(-1.0)
    assert score(quality, "Paris.", human("Paris.", quality=0.6)) == pytest.approx(0.2)
    assert score(quality, "Par", human("Paris.", quality=1.0)) == pytest.approx(46 / 83)


def test_quality_is_that_of_the_nearest_reference() -> None:
    references = human("Paris.", quality=1.0), human("xyz", quality=0.0)
    # Similarities 1 and 0: weights 1 / (1 + e^-10) and the rest, which is multiplied by a similarity of 0.
    assert score(QualitySimilarity(), "Paris.", *references) == pytest.approx(1 / (1 + math.exp(-10)))
    assert score(QualitySimilarity(temperature=1.0), "Paris.", *references) == pytest.approx(1 / (1 + math.exp(-1)))
    right, wrong = human("The capital is Paris.", quality=1.0), human("The capital is Rome.", quality=0.0)
    assert score(QualitySimilarity(), right.text, right, wrong) > 0.8
    assert score(QualitySimilarity(), wrong.text, right, wrong) < -0.8


def test_quality_from_ranks_and_without_labels() -> None:
    quality = QualitySimilarity()
    ranked = human("aaa", rank=0), human("bbb", rank=1), human("ccc", rank=2)
    sure = 1 / (1 + 2 * math.exp(-10))  # the weight of a copy next to two responses with nothing in common
    assert score(quality, "aaa", *ranked) == pytest.approx(sure)
    assert score(quality, "bbb", *ranked) == pytest.approx(0.0)
    assert score(quality, "ccc", *ranked) == pytest.approx(-sure)
    assert score(quality, "aaa", human("aaa", quality=0.9, rank=3)) == pytest.approx(0.8)  # the label comes first
    assert score(quality, "aaa", human("aaa", rank=0)) == pytest.approx(1.0)
    assert score(quality, "aaa", human("aaa")) == pytest.approx(0.5)
    assert score(quality, "aaa") == 0.0
    assert score(quality, "", human("aaa", quality=0.0)) == 0.0


def test_labels_in_the_prompt_do_not_change_the_reward() -> None:
    """The reward scores the generated response: no factor sees the quality labels of earlier human turns."""
    labelled = Conversation((Message("user", "Hi", 1.0), human("Hello", 1.0, 0), Message("user", "And?", 1.0)))
    bare = Conversation((Message("user", "Hi"), human("Hello"), Message("user", "And?")))
    reply = Reply("Hello there, my friend.", 6, True)
    assert torch.equal(Reward()([labelled], [reply]), Reward()([bare], [reply]))


@pytest.mark.parametrize(
    ("text", "expected"), [("", -1), ("one", -0.75), ("1 2 3", -0.25), ("1 2 3 4", 0), ("巴黎是的", 0)]
)
def test_too_short(text: str, expected: float) -> None:
    assert score(TooShort(min_words=4), text) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (4, 0), (5, -0.25), (8, -1), (100, -1)])
def test_too_long(count: int, expected: float) -> None:
    assert score(TooLong(max_words=4), "word " * count) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0), (1, (1 - math.cos(math.pi / 4)) / 2), (2, 0.5), (4, 1), (10, 1), (15, 0.5), (20, 0), (99, 0)],
)
def test_appropriate_length(count: int, expected: float) -> None:
    assert score(AppropriateLength(low=4, high=10), "word " * count) == pytest.approx(expected, abs=1e-6)


def test_distinct_ngrams() -> None:
    factor = DistinctNgrams(max_n=2, min_words=4)
    assert score(factor, "a b c d e") == 1.0
    assert score(factor, "a b a b a") == pytest.approx((2 / 5 + 2 / 4) / 2)
    assert score(factor, "a") == pytest.approx((1 / 4 + 0) / 2)  # of the 4 words and 3 pairs in four words
    assert score(factor, "a b") == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert score(factor, "") == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("Yes.", 0),
        ("The capital of France is Paris.", 0),
        ("a b c a b c", -1 / 4),  # abc bca cab abc
        ("No. No. No.", -2 / 3),  # three equal sentences
        ("你好。你好。", -1 / 2),
        ("good\nbad\ngood", -1 / 3),
        ("!!!!!!!!", -7 / 8),
        ("hahahaha", -6 / 8),
        ("👍👍👍👍👍", -4 / 5),
        ("if x:\n        y", 0),  # indentation is not a loop
    ],
)
def test_repetition(text: str, expected: float) -> None:
    assert score(Repetition(n=3), text) == pytest.approx(expected)


def test_missing_end() -> None:
    assert score(MissingEnd(), "Paris", ended=False) == -1.0
    assert score(MissingEnd(), "Paris", ended=True) == 0.0


def test_breakdown_is_weighted_and_sums_to_the_reward() -> None:
    reward = Reward([TooShort(weight=0.5, min_words=4), MissingEnd(weight=2.0)])
    prompts, replies = [prompt()] * 2, [Reply("one two", 2, False), Reply("1 2 3 4", 5, True)]
    parts = reward.breakdown(prompts, replies)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "too_short": [-0.25, 0.0],
        "missing_end": [-2.0, 0.0],
    }
    assert reward(prompts, replies).tolist() == [-2.25, 0.0]
    assert reward([], []).shape == (0,)


def test_names() -> None:
    class HTTPLinks2Good(ManyWords):
        pass

    class Renamed(ManyWords):
        name = "chatty"

    class ForgetsSuper(ManyWords):
        def __init__(self) -> None:
            pass

    factors = [TooShort(), HTTPLinks2Good(), Renamed(), TooShort(), TooShort(), ForgetsSuper()]
    assert list(Reward(factors).factors) == [
        "too_short",
        "http_links2_good",
        "chatty",
        "too_short_2",
        "too_short_3",
        "forgets_super",
    ]
    assert Reward([ForgetsSuper()])([prompt()], [Reply("one two", 2, True)]).tolist() == [2.0]


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        (torch.zeros(2, 1), r"'returns' returned shape \(2, 1\): .* shape \(2,\)"),
        (torch.zeros(3), r"'returns' returned shape \(3,\)"),
        (torch.tensor(1.0), r"'returns' returned shape \(\)"),
        ([0.0, 1.0], "'returns' returned a list"),
        (torch.zeros(2, dtype=torch.complex64), "'returns' returned a complex tensor"),
        (torch.tensor([0.0, math.nan]), "'returns' returned nan for response 1, 'second'"),
        (torch.tensor([-math.inf, 0.0]), "'returns' returned -inf for response 0, 'first'"),
    ],
)
def test_a_factor_with_an_invalid_result_is_named(scores: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Reward([Returns(scores)])([prompt()] * 2, [Reply("first", 1, True), Reply("second", 1, True)])


@pytest.mark.parametrize("result", [None, "0.5", 1j, [0.5], torch.zeros(2)])
def test_a_score_that_is_not_a_number_names_the_factor(result: object) -> None:
    class Broken(ReplyFactor):
        def score(self, prompt: Conversation, reply: Reply) -> float:
            return result  # type: ignore[return-value]

    complaint = r"reward factor 'broken' returned .* for the response 'hi': score\(\) must return a finite number"
    with pytest.raises(UserError, match=complaint):
        Reward([Broken()])([prompt()], [Reply("hi", 1, True)])


def test_numbers_of_other_types_are_scores() -> None:
    class Returned(ReplyFactor):
        def score(self, prompt: Conversation, reply: Reply) -> float:
            return {"bool": True, "int": 2, "tensor": torch.tensor(0.5), "large": 1e21}[reply.text]  # type: ignore[return-value]

    replies = [Reply(text, 1, True) for text in ("bool", "int", "tensor", "large")]
    assert Reward([Returned()])([prompt()] * 4, replies).tolist() == [1.0, 2.0, 0.5, pytest.approx(1e21)]


def test_a_new_module_in_the_folder_exports_its_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text("""
from rlchat.rewards.base import ReplyFactor

class Shouting(ReplyFactor):
    def score(self, prompt, reply):
        return -float(reply.text.isupper())
""")
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    rewards._homes.cache_clear()
    try:
        factor = rewards.Shouting()
        assert score(factor, "HELLO") == -1.0
        assert factor.describe()["class_path"] == "rlchat.rewards.Shouting"
        assert "Shouting" in dir(rewards)
        with pytest.raises(AttributeError, match="Whispering"):
            rewards.Whispering  # noqa: B018
    finally:
        monkeypatch.undo()
        rewards._homes.cache_clear()
        vars(rewards).pop("Shouting", None)


def test_scores_of_another_type_become_float32_without_a_graph() -> None:
    scores = torch.ones(1, dtype=torch.float64, requires_grad=True)
    total = Reward([Returns(scores)])([prompt()], [Reply("x", 1, True)])
    assert total.dtype == torch.float32
    assert not total.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: TooShort(min_words=0),
        lambda: TooLong(max_words=0),
        lambda: AppropriateLength(low=0),
        lambda: AppropriateLength(low=10, high=5),
        lambda: DistinctNgrams(max_n=0),
        lambda: DistinctNgrams(max_n=3, min_words=2),
        lambda: Repetition(n=0),
        lambda: QualitySimilarity(temperature=0),
    ],
)
def test_invalid_options_are_errors(make: object) -> None:
    with pytest.raises(UserError):
        make()  # type: ignore[operator]


def reward_from(config: str, *more: str) -> Reward:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_args(["--config", config, *more])).reward
    assert isinstance(reward, Reward)
    return reward


@pytest.mark.filterwarnings(r"ignore:\s*Hit failing import")  # of the module that the test of new modules has removed
def test_built_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "reward.yaml"
    config.write_text("""
reward:
  class_path: rlchat.rewards.Reward
  init_args:
    factors:
    - class_path: rlchat.rewards.TooShort
      init_args: {weight: 0.5, min_words: 2}
    - class_path: rlchat.rewards.MissingEnd
""")
    reward = reward_from(str(config))
    assert reward([prompt()], [Reply("Paris", 4, False)]).tolist() == [-1.25]
    longer = reward_from(str(config), "--reward.factors+=Repetition", "--reward.factors.n=2")
    assert list(longer.factors) == ["too_short", "missing_end", "repetition"]

    config.write_text(config.read_text().replace("min_words: 2", "min_words: 0"))
    with pytest.raises(UserError, match=r"invalid value 0 for TooShort\.min_words: expected a positive integer"):
        reward_from(str(config))

    config.write_text("reward: {class_path: rlchat.rewards.Reward}\n")
    assert list(reward_from(str(config)).factors) == [
        "quality_similarity",
        "too_short",
        "too_long",
        "appropriate_length",
        "distinct_ngrams",
        "repetition",
        "missing_end",
    ]


def test_a_users_factor_is_found_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_for_a_test.py").write_text("""
import torch
from rlchat.rewards import Factor

class SaysPlease(Factor):
    def __init__(self, weight: float = 1.0, please: str = "please"):
        super().__init__(weight)
        self.please = please

    def __call__(self, prompts, replies):
        return torch.tensor([float(self.please in reply.text) for reply in replies])
""")
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "reward.yaml"
    config.write_text("""
reward:
  class_path: rlchat.rewards.Reward
  init_args:
    factors:
    - class_path: my_rewards_for_a_test.SaysPlease
      init_args: {weight: 0.25, please: bitte}
""")
    replies = [Reply("bitte sehr", 3, True), Reply("please", 2, True)]
    parts = reward_from(str(config)).breakdown([prompt()] * 2, replies)
    assert {name: part.tolist() for name, part in parts.items()} == {"says_please": [0.25, 0.0]}


FACTORS = default_factors()
BOUNDS = {
    "quality_similarity": (-1, 1),
    "too_short": (-1, 0),
    "too_long": (-1, 0),
    "appropriate_length": (0, 1),
    "distinct_ngrams": (0, 1),
    "repetition": (-1, 0),
    "missing_end": (-1, 0),
}
texts = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["yes", "no", "巴", "👍", ".", "\n", "well-known"]), max_size=300).map(" ".join),
    st.tuples(st.text(max_size=5), st.integers(0, 300)).map(
        lambda unit_and_times: unit_and_times[0] * unit_and_times[1]
    ),
)
messages = st.builds(
    human, texts, quality=st.none() | st.floats(0, 1), rank=st.none() | st.integers(min_value=0, max_value=5)
)
rows = st.tuples(
    st.lists(messages, max_size=3).map(lambda references: prompt(*references)),
    st.builds(Reply, texts, tokens=st.integers(1, 500), ended=st.booleans()),
)
batches = st.lists(rows, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(batch=batches, data=st.data())
def test_properties_of_a_reward_on_any_batch(batch: list[tuple[Conversation, Reply]], data: st.DataObject) -> None:
    """Bounds; the breakdown sums to the reward; rows are independent of each other and of their order."""
    prompts, replies = [row[0] for row in batch], [row[1] for row in batch]
    reward = Reward(FACTORS)
    parts = reward.breakdown(prompts, replies)
    total = reward(prompts, replies)
    assert total.dtype == torch.float32
    assert total.shape == (len(batch),)
    assert torch.stack(list(parts.values())).double().sum(dim=0).tolist() == pytest.approx(total.tolist(), abs=1e-5)
    for factor in FACTORS:
        low, high = BOUNDS[factor.name]
        scores = factor(prompts, replies)
        assert ((scores >= low - 1e-6) & (scores <= high + 1e-6)).all(), (factor.name, scores)

    order = data.draw(st.permutations(range(len(batch))))
    shuffled = reward.breakdown([prompts[i] for i in order], [replies[i] for i in order])
    alone = [reward.breakdown([p], [r]) for p, r in batch]
    for name, part in parts.items():
        assert shuffled[name].tolist() == part[list(order)].tolist()
        assert torch.cat([one[name] for one in alone]).tolist() == part.tolist()


@settings(deadline=None)
@given(text=texts, other=texts)
def test_chrf_is_symmetric_and_bounded(text: str, other: str) -> None:
    assert 0 <= chrf(text, other) <= 1 + 1e-12
    assert chrf(text, other) == pytest.approx(chrf(other, text))
    assert chrf(text, text) == (1.0 if text.split() else 0.0)


def test_a_reward_moves_the_models_of_its_factors_to_the_device() -> None:
    class OnDevice(TooShort):
        device: torch.device | None = None

        def to(self, device: torch.device) -> None:
            self.device = device

    factor = OnDevice()
    reward = Reward([factor, TooLong()])
    assert reward.to(torch.device("meta")) is reward
    assert factor.device == torch.device("meta")
