"""The measures, on a scripted model whose responses and log-probs are known, and on a random one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.chat_models import chain, random_policy, scripted_policy

from rlchat.chat.verdicts import JudgedResponse
from rlchat.conversation import Check, Conversation, Message
from rlchat.learn.examples import judged_prompts
from rlchat.learn.measure import (
    Judged,
    Question,
    Yardstick,
    agreement,
    judged_responses,
    logprob_sums,
    measure,
    nats_per_token,
    questions_of,
    render,
    respond,
    reward_accuracy,
)
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling
from rlchat.rewards import Reply
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

HELLO = Conversation((Message("user", "Hello"),))


@pytest.fixture
def says_ab(byte_tokenizer: ChatTokenizer) -> PolicyBundle:
    """Responds ``ab`` to everything."""
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, [97, 98]))
    bundle.model.eval()
    return bundle


@pytest.mark.parametrize(
    ("text", "good", "others", "agrees"),
    [
        ("ab", True, ("ba",), 1),
        ("ab", False, ("ba",), 0),
        ("ba", True, ("ab",), 0),
        ("ba", False, ("ab",), 1),
        ("ab", True, (), 1),  # it would say nothing else
        ("ab", False, (), 0),
        ("b", True, ("ab", "bbbb", "bbbbb"), 1),  # more likely than two of three
    ],
)
def test_agreement(says_ab: PolicyBundle, text: str, good: bool, others: tuple[str, ...], agrees: int) -> None:
    assert agreement(says_ab, [Question(HELLO, text, good, others)]) == agrees


def test_log_probs_are_those_of_the_whole_response(byte_tokenizer: ChatTokenizer) -> None:
    """Compared with one forward pass per response; batches pad."""
    bundle = random_policy(byte_tokenizer)
    bundle.model.eval()
    texts = ["a", "abc", "b" * 20]
    found = logprob_sums(bundle, [render(bundle, HELLO, text) for text in texts])
    for text, (total, tokens) in zip(texts, found, strict=True):
        ids = byte_tokenizer.render(HELLO.say("assistant", text)).ids
        with torch.no_grad():
            hidden = bundle.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
            logprobs = bundle.model.logits(hidden)[0].log_softmax(-1)
        first = len(byte_tokenizer.render_prompt(HELLO).ids)
        assert tokens == len(text) + 1 == len(ids) - first  # and the end marker
        assert total == pytest.approx(sum(float(logprobs[t - 1, ids[t]]) for t in range(first, len(ids))), abs=1e-4)
    mean = -sum(total for total, _ in found) / sum(tokens for _, tokens in found)
    assert nats_per_token(bundle, [render(bundle, HELLO, text) for text in texts]) == pytest.approx(mean)
    assert nats_per_token(bundle, []) is None
    ((_, tokens),) = logprob_sums(bundle, [render(bundle, HELLO, "abc", ended=False)])
    assert tokens == 3  # without the end marker


def test_the_figures_of_a_model(says_ab: PolicyBundle) -> None:
    controls = [Conversation(HELLO.messages, check=Check((answer,))) for answer in ("ab", "ba", "ab")]
    thread = HELLO.with_reply(Message("assistant", "ab"))
    found = measure(
        says_ab,
        Yardstick([Question(HELLO, "ab", True, ("ba",))], [], [thread], controls, [(HELLO, Reply("ab", 3, True))], 8),
    )
    assert (found.agrees, found.verdicts, found.correct, found.controls) == (1, 1, 2, 3)
    assert found.perplexity == pytest.approx(1, abs=1e-3)
    assert found.original_nll == pytest.approx(0, abs=1e-3)
    nothing = measure(says_ab, Yardstick([], [], [], [], [], 8))
    assert (nothing.agrees, nothing.perplexity, nothing.correct, nothing.original_nll) == (None, None, None, None)


def test_reward_accuracy_by_hand(says_ab: PolicyBundle) -> None:
    """Three of the four pairs are right: 3 > 2, 3 > 0.5 and 1 > 0.5, but not 1 > 2."""
    rewards = {"a": (True, 3.0), "b": (True, 1.0), "c": (False, 2.0), "d": (False, 0.5)}
    sums = logprob_sums(says_ab, [render(says_ab, HELLO, text) for text in rewards])
    judged = [
        Judged(HELLO, text, liked, total - reward)
        for (text, (liked, reward)), (total, _) in zip(rewards.items(), sums, strict=True)
    ]
    assert reward_accuracy(says_ab, judged) == 3 / 4
    assert reward_accuracy(says_ab, [one for one in judged if one.liked]) is None
    assert reward_accuracy(says_ab, []) is None


def test_the_original_model_has_a_reward_accuracy_of_one_half(says_ab: PolicyBundle) -> None:
    prompts = judged_prompts(
        [
            JudgedResponse(HELLO, "no", "corrected", "yes", "", "1"),
            JudgedResponse(Conversation((Message("user", "Bye"),)), "ab", "good", "", "", "2"),
            JudgedResponse(Conversation((Message("user", "Hi"),)), "cd", "bad", "", "", "3"),
        ]
    )
    judged = judged_responses(prompts, says_ab)
    assert {(one.text, one.liked) for one in judged} == {("yes", True), ("no", False), ("ab", True), ("cd", False)}
    assert reward_accuracy(says_ab, judged) == 0.5


def test_what_verdicts_are_compared_with(says_ab: PolicyBundle) -> None:
    bye = Conversation((Message("user", "Bye"),))
    verdicts = [
        JudgedResponse(HELLO, "no", "corrected", "yes", "", "1"),
        JudgedResponse(HELLO, "nay", "bad", "", "", "2"),  # worse than the correction
        JudgedResponse(bye, "ab", "bad", "", "", "3"),  # all that the model says
        JudgedResponse(bye, "cd", "bad", "", "", "4"),  # compared with what the model says
    ]
    found = questions_of(verdicts, judged_prompts(verdicts), says_ab, Sampling(8, 1.0), seed=0)
    assert [(q.text, q.good, q.others) for q in found] == [
        ("yes", True, ("no",)),
        ("nay", False, ("yes",)),
        ("ab", False, ()),
        ("cd", False, ("ab",)),
    ]


def test_responses_repeat_with_their_seed(byte_tokenizer: ChatTokenizer) -> None:
    bundle = random_policy(byte_tokenizer)
    bundle.model.eval()
    first, again, other = ([r.text for r in respond(bundle, [HELLO] * 3, Sampling(6, 1.0), s)] for s in (1, 1, 2))
    assert first == again != other


def test_a_version_that_has_diverged_has_an_infinite_perplexity(byte_tokenizer: ChatTokenizer) -> None:
    bundle = random_policy(byte_tokenizer)
    bundle.model.eval()
    with torch.no_grad():
        bundle.model.backbone.head_weight.mul_(1e6)
    thread = Conversation((Message("user", "Hello"), Message("assistant", "abc")))
    found = measure(bundle, Yardstick([], [], [thread], [], [(HELLO, Reply("abc", 4, ended=True))], 8))
    assert found.perplexity == math.inf
    assert found.original_nll is not None
    assert found.original_nll > 710
