"""What `rlchat demo --real` measures, on models whose figures can be worked out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.chat_models import chain, random_policy, scripted_policy

from rlchat.conversation import Check, Conversation, Message
from rlchat.demo.real.measure import (
    Measured,
    Sampled,
    is_correct,
    log_likelihoods,
    mean_kl,
    perplexity,
    reply_figures,
    sample_replies,
)
from rlchat.models.model_file import PolicyBundle
from rlchat.rewards import MissingEnd, Reply, Reward, TooManySentences
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

HELLO = Conversation((Message("user", "Hello"),), references=(Message("assistant", "Good day"),))


def sampled(text: str, *, ended: bool = True, check: Check | None = None) -> Sampled:
    return Sampled(replace(HELLO, check=check), [1], [2, 3], Reply(text, 2, ended))


def uniform_policy(tokenizer: ChatTokenizer) -> PolicyBundle:
    """All tokens that a reply can contain are equally likely."""
    bundle = random_policy(tokenizer)
    with torch.no_grad():
        bundle.model.backbone.head_weight.zero_()
    return bundle


def test_figures_of_replies_by_hand() -> None:
    samples = [sampled("It is red."), sampled("It is red. It is."), sampled("It is", ended=False), sampled("A b c d.")]
    figures = reply_figures(samples, Reward([MissingEnd(), TooManySentences(weight=2.0, max_sentences=1)]))
    assert figures == {"goal": 0.5, "reward": (0 - 2 - 1 + 0) / 4, "words": (3 + 5 + 2 + 4) / 4, "truncated": 0.25}


def test_a_control_question_needs_a_check_that_passes() -> None:
    assert is_correct(sampled("It is Paris.", check=Check(("Paris",))))
    assert not is_correct(sampled("It is Rome.", check=Check(("Paris",))))
    assert not is_correct(sampled("It is Paris."))


def test_before_and_after_are_side_by_side() -> None:
    asked = Check(("Paris",))
    before = Measured([sampled("It is red.")], [], [sampled("Rome", check=asked)], 2.0)
    after = Measured([sampled("Red. Blue.")], [], [sampled("Paris", check=asked)], 3.0)
    assert before.replies_beside(after) == [
        {
            "prompt": "Hello",
            "before": {"reply": "It is red.", "goal": True},
            "after": {"reply": "Red. Blue.", "goal": False},
        }
    ]
    assert before.control_beside(after) == [
        {
            "question": "Hello",
            "before": {"reply": "Rome", "correct": False},
            "after": {"reply": "Paris", "correct": True},
        }
    ]


def test_a_scripted_reply_comes_back_for_each_prompt_in_order(byte_tokenizer: ChatTokenizer) -> None:
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"Hi.")))
    prompts = [Conversation((Message("user", text),)) for text in ("abcdef", "a", "abc")]
    samples = sample_replies(bundle, prompts, temperature=0.0)
    assert [sample.reply for sample in samples] == [Reply("Hi.", 4, True)] * 3
    assert [sample.prompt for sample in samples] == prompts
    assert samples[0].reply_ids == [*b"Hi.", byte_tokenizer.end_id]
    assert samples[1].prompt_ids == byte_tokenizer.render_prompt(prompts[1]).ids


def test_the_perplexity_of_equally_likely_tokens_is_their_number(byte_tokenizer: ChatTokenizer) -> None:
    choices = byte_tokenizer.vocab_size - len(byte_tokenizer.unsayable_ids)
    bundle = uniform_policy(byte_tokenizer)
    assert perplexity(bundle, [HELLO, HELLO]) == pytest.approx(choices, rel=1e-4)
    ((total, count),) = log_likelihoods(bundle, [([97, 98, 99, 100], [False, True, False, True])])
    assert count == 2
    assert total == pytest.approx(-2 * math.log(choices), rel=1e-4)


def test_rows_of_other_lengths_do_not_change_a_likelihood(byte_tokenizer: ChatTokenizer) -> None:
    bundle = random_policy(byte_tokenizer)
    short, long = ([97, 98, 99], [False, True, True]), (list(range(97, 117)), [False] + [True] * 19)
    alone = log_likelihoods(bundle, [short]) + log_likelihoods(bundle, [long])
    for (total, count), (expected, number) in zip(log_likelihoods(bundle, [long, short])[::-1], alone, strict=True):
        assert count == number
        assert total == pytest.approx(expected, abs=1e-3)


def test_the_kl_of_a_sharp_model_to_an_equally_likely_one(byte_tokenizer: ChatTokenizer) -> None:
    """The scripted model is certain of its four tokens, each of which the other gives the probability 1/choices."""
    sharp = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"Hi.")))
    choices = byte_tokenizer.vocab_size - len(byte_tokenizer.unsayable_ids)
    samples = sample_replies(sharp, [HELLO], temperature=1.0)
    assert mean_kl(sharp, uniform_policy(byte_tokenizer), samples) == pytest.approx(4 * math.log(choices), rel=1e-3)
    assert mean_kl(sharp, sharp, samples) == 0
