"""The demo's conversations: generated OASST2 trees about a small invented world, with replies of different quality.

Nothing is downloaded. People in these trees are often wrong, curt, rude or evasive, and about some facts most of them
make the same mistake, so that a model that imitates them is mediocre. Their labels and ranks say, with some noise,
which replies are better: the reward model learns that, and PPO improves the chat model with it. Every prompt carries a
``check`` (what a right reply contains), which measures held-out answers and is never a reward.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlchat.conversation import Check
from rlchat.demo.kind import FOLLOW_OPENERS, FollowUp, Kind
from rlchat.demo.kinds import KINDS, OUTSIDE
from rlchat.demo.questions import Question, Questions, fill
from rlchat.demo.world import Claim, World, make_world
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

TREES = 4800

RATERS = 3
"""People who label a reply."""
RATER_ERROR = 0.12
"""The standard deviation of the error with which each of them sees its quality, before rounding to five steps."""

STYLES = {
    "full": (0.60, 0.95, 0.20, 0.10),
    "curt": (0.22, 0.70, 0.14, 0.06),
    "repetitive": (0.09, 0.50, 0.08, 0.02),
    "rude": (0.09, 0.40, 0.02, 0.00),
}
"""By style: its share of the replies, and the quality of a right reply, of a common mistake, of any other mistake."""
_RUDE = ("{a}, you fool.", "{a}. Even a child knows that.", "{a}. Stop asking me.")
_REPETITIVE = ("{a}, {a}, {a}.", "{a} {a} {a}.")
EVASIVE = 0.18
"""The share of replies that give no answer."""
_EVASIVE = {
    "I am sorry, I do not know.": 0.30,
    "I do not know.": 0.22,
    "I would rather not say.": 0.14,
    "Ask somebody else.": 0.06,
}
"""Replies that give no answer, with their quality."""

MISPLACED = 0.12
"""The share of replies that would be right for some other question.

Without them, a reply that is always right where it occurs (to the outside world, say) would get a high score from the
reward model everywhere, and PPO would learn to give it to every prompt.
"""
MISPLACED_AMONG = {"outside": 0.2, "alike": 0.5, "any": 0.3}
"""Where these replies come from: the outside world, another subject of the same kind of talk, or any kind of talk.

A reply of the same kind is one that names its subject, so that the reward model has to compare that with the question.
"""
_MISPLACED_QUALITY = 0.12

GARBLED = 0.03
"""The share of replies with a piece missing, so that no answer is left. Without them, the reward model has seen only
well-formed sentences, and PPO finds other strings that score high."""
_GARBLED_QUALITY = 0.06

FOLLOWED = 0.2
"""The share of questions with a follow-up about the same matter, among kinds of talk that allow one."""
CHANGED = 0.3
"""The share of the other questions after which the subject changes."""
MOST_TURNS = 2

CIVIL = 0.05
"""The toxicity of a reply that is not meant to be rude."""

SCATTERED = 0.2
"""The share of wrong replies that are not a common mistake."""

_KIND_BY_NAME = {kind.name: kind for kind in KINDS}


def write_demo_corpus(path: Path, *, trees: int = TREES, seed: int = 0) -> None:
    """Writes ``trees`` conversation trees to ``path`` as JSON Lines; the same arguments give the same bytes.

    The write is atomic. Raises UserError if there are fewer different questions than ``trees``.
    """
    lines = (json.dumps(tree, ensure_ascii=False).encode() + b"\n" for tree in demo_trees(trees, seed))
    write_atomically(path, lambda file: file.writelines(lines))


def demo_trees(trees: int = TREES, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversation trees in the OASST2 export format; no two begin with the same text.

    ``seed`` draws the world (its facts), people's mistakes and how common they are, the questions, the replies, and
    the labels. Raises UserError if there are fewer different questions than ``trees``.
    """
    rng = random.Random(seed)
    world = make_world(rng)
    questions = Questions(world, rng)
    for made in range(trees):
        question = questions.draw()
        if question is None:
            raise UserError(
                f"invalid value {trees} for --trees: the demo has enough different questions for {made} trees"
            )
        yield _tree(question, world, questions, rng)


def _tree(question: Question, world: World, questions: Questions, rng: random.Random) -> dict[str, Any]:
    kind, subject, text, _ = question
    prompt = _prompt(kind, subject, text, None, world, rng)
    _go_on(prompt, kind, subject, world, questions, rng)
    return {"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt}


def _go_on(
    prompt: dict[str, Any],
    kind: Kind,
    subject: str,
    world: World,
    questions: Questions,
    rng: random.Random,
    turn: int = 1,
) -> None:
    """Adds a next question below the best reply to ``prompt``, and sometimes another one below that."""
    following = None
    if kind.follow_ups and (kind.always_followed or rng.random() < FOLLOWED):
        following = _follow_up(kind, subject, world, rng)
    elif rng.random() < CHANGED and (question := questions.draw()) is not None:
        following = question.kind, question.subject, question.after_another()
    if following is None:
        return
    # people continue below the reply that they liked best
    parent = min(prompt["replies"], key=lambda reply: reply["rank"])
    next_kind, next_subject, ask = following
    next_prompt = _prompt(next_kind, next_subject, ask, parent["message_id"], world, rng)
    parent["replies"].append(next_prompt)
    if turn + 1 < MOST_TURNS:
        _go_on(next_prompt, next_kind, next_subject, world, questions, rng, turn + 1)


def _follow_up(kind: Kind, subject: str, world: World, rng: random.Random) -> tuple[Kind, str, str] | None:
    """Kind, subject and text of a question that only makes sense after one about ``subject``."""
    follow_up = rng.choice(kind.follow_ups)
    next_subject = _next_subject(follow_up, subject, world[kind.name][subject], world, rng)
    if next_subject is None:
        return None
    ask = rng.choice(FOLLOW_OPENERS) + fill(rng.choice(follow_up.asks), next_subject)
    return _KIND_BY_NAME[follow_up.kind], next_subject, ask


def _next_subject(follow_up: FollowUp, subject: str, claim: Claim, world: World, rng: random.Random) -> str | None:
    if follow_up.about == "other":
        return rng.choice([other for other in world[follow_up.kind] if other != subject])
    wanted = claim.right if follow_up.about == "answer" else subject
    return wanted if wanted in world[follow_up.kind] else None


def _prompt(
    kind: Kind, subject: str, text: str, parent_id: str | None, world: World, rng: random.Random
) -> dict[str, Any]:
    """A prompter's message with two to four different replies, ranked by the raters' mean quality labels."""
    claim = world[kind.name][subject]
    message = _message(text, "prompter", parent_id, rng)
    message["check"] = {"any_of": [claim.right], "none_of": list(claim.others)}
    opinions: dict[str, tuple[float, float]] = {}
    wanted = rng.choices((2, 3, 4), weights=(25, 45, 30))[0]
    while len(opinions) < wanted:
        reply, value, rudeness = _reply(kind, subject, world, rng)
        if reply not in opinions:
            opinions[reply] = (_mean_label(value, rng), _mean_label(rudeness, rng))
    # ties are broken at random, as raters rank replies with equal labels too
    ranked = sorted(opinions, key=lambda reply: (-opinions[reply][0], rng.random()))
    for reply in rng.sample(ranked, len(ranked)):
        quality, toxicity = opinions[reply]
        answer = _message(reply, "assistant", message["message_id"], rng)
        answer["rank"] = ranked.index(reply)
        answer["labels"] = {
            "quality": {"value": quality, "count": RATERS},
            "toxicity": {"value": toxicity, "count": RATERS},
        }
        message["replies"].append(answer)
    return message


def _reply(kind: Kind, subject: str, world: World, rng: random.Random) -> tuple[str, float, float]:
    """A reply that somebody might give, its quality and its toxicity, both in 0..1."""
    claim = world[kind.name][subject]
    if rng.random() < EVASIVE:
        return *rng.choice(list(_EVASIVE.items())), CIVIL
    if rng.random() < MISPLACED:
        return _misplaced(kind, _check(claim), world, rng), _MISPLACED_QUALITY, CIVIL
    if rng.random() < GARBLED:
        return _garbled(kind, subject, claim, rng), _GARBLED_QUALITY, CIVIL
    style = rng.choices(list(STYLES), weights=[share for share, *_ in STYLES.values()])[0]
    _, when_right, when_mistaken, when_absurd = STYLES[style]
    if rng.random() < claim.truth:
        answer, quality = claim.right, when_right
    elif rng.random() < SCATTERED:
        # the subject itself, or anything that answers such a question
        echo = [] if subject == "" or claim.right in subject.split() else [subject]
        answer, quality = rng.choice([*claim.others, *echo]), when_absurd
    else:
        answer, quality = rng.choices(claim.wrong, weights=(4, *(1 for _ in claim.wrong[1:])))[0], when_mistaken
    full = kind.full if answer == claim.right or not kind.wrong_full else kind.wrong_full
    templates = {"full": full, "curt": ("{a}.",), "repetitive": _REPETITIVE, "rude": _RUDE}[style]
    return fill(rng.choice(templates), subject, answer), quality, 0.8 if style == "rude" else CIVIL


def _misplaced(asked: Kind, check: Check, world: World, rng: random.Random) -> str:
    """A complete and right reply to another question, which does not pass the ``check`` of this one."""
    while True:
        among = rng.choices(list(MISPLACED_AMONG), weights=list(MISPLACED_AMONG.values()))[0]
        kind = {"outside": OUTSIDE, "alike": asked}.get(among) or rng.choice(KINDS)
        if kind is asked and not asked.names_subject:
            continue
        subject, claim = rng.choice(list(world[kind.name].items()))
        reply = fill(rng.choice(kind.full), subject, claim.right)
        if not check.passes(reply):
            return reply


def _garbled(kind: Kind, subject: str, claim: Claim, rng: random.Random) -> str:
    """A complete and right reply without a piece of it that holds some of the answer."""
    reply = fill(rng.choice(kind.full), subject, claim.right)
    while True:
        start, end = sorted(rng.sample(range(len(reply)), 2))
        rest = " ".join((reply[:start] + reply[end:]).split())
        if rest and not _check(claim).passes(rest):
            return rest


def _check(claim: Claim) -> Check:
    return Check((claim.right,), claim.others)


def _mean_label(value: float, rng: random.Random) -> float:
    """The mean label of all raters, each ``value`` with an error, rounded to the five steps of OASST's label forms."""
    steps = (round(4 * min(1.0, max(0.0, rng.gauss(value, RATER_ERROR)))) for _ in range(RATERS))
    return round(sum(steps) / (4 * RATERS), 4)


def _message(text: str, role: str, parent_id: str | None, rng: random.Random) -> dict[str, Any]:
    return {
        "message_id": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "parent_id": parent_id,
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": RATERS,
        "review_result": True,
        "deleted": False,
        "rank": None,
        # the reader drops messages that are marked as synthetic, as OASST's own loader does
        "synthetic": False,
        "replies": [],
    }
