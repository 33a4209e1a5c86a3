"""The demo's conversations: OASST2 trees about a small invented world, with replies of differing worth.

Nothing is downloaded. People in it are often wrong, curt, rude or evasive, and on some matters most of them share one
mistake, so that a model which imitates them is mediocre; their labels and ranks say, with some noise, which replies
were better, and that is what the reward model and PPO can climb. Every prompt carries a ``check`` (what a right reply
holds), which measures held-out answers and is never a reward.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlchat.demo.world import FOLLOW_OPENERS, KINDS, Claim, FollowUp, Kind, World, make_world
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

TREES = 4000

RATERS = 3
"""People who label a reply; each sees its worth with an error of this standard deviation, on a scale of five steps."""
RATER_ERROR = 0.16

# how often people who answer do it so, and what that is worth when right, wrong as many are, and wrong as few are
STYLES = {
    "full": (0.60, 0.95, 0.20, 0.10),
    "curt": (0.22, 0.70, 0.14, 0.06),
    "repetitive": (0.09, 0.50, 0.08, 0.02),
    "rude": (0.09, 0.40, 0.02, 0.00),
}
_RUDE = ("{a}, you fool.", "{a}. Even a child knows that.", "{a}. Stop asking me.")
_REPETITIVE = ("{a}, {a}, {a}.", "{a} {a} {a}.")
EVASIVE = 0.08
"""The share of replies that give no answer."""
# with what each is worth
_EVASIVE = {
    "I am sorry, I do not know.": 0.30,
    "I do not know.": 0.22,
    "I would rather not say.": 0.14,
    "Ask somebody else.": 0.06,
}

FOLLOWED = 0.2
"""The share of trees that go on to a second question, of those whose kind of talk allows one."""

CIVIL = 0.05
"""How rude a reply is that is not meant to be."""

SCATTERED = 0.2
"""The share of wrong replies that make no common mistake."""

_KIND_BY_NAME = {kind.name: kind for kind in KINDS}


def write_demo_corpus(path: Path, *, trees: int = TREES, seed: int = 0) -> None:
    """Writes ``trees`` conversation trees to ``path``, one JSON object a line; the same bytes for the same arguments.

    The file appears under its name only when it is complete. Raises UserError where ``trees`` is more than there are
    different questions.
    """
    lines = (json.dumps(tree, ensure_ascii=False).encode() + b"\n" for tree in demo_trees(trees, seed))
    write_atomically(path, lambda file: file.writelines(lines))


def demo_trees(trees: int = TREES, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversation trees in the OASST2 export format; no two begin with the same text.

    The seed draws the world (who lives where), its mistakes and how common they are, the questions, the replies, and
    the labels. Raises UserError where ``trees`` is more than there are different questions.
    """
    rng = random.Random(seed)
    world = make_world(rng)
    questions = _questions(world, rng)
    for made in range(trees):
        question = next(questions, None)
        if question is None:
            raise UserError(f"the demo has {made} different questions, not {trees}: ask for fewer trees")
        yield _tree(*question, world, rng)


def _questions(world: World, rng: random.Random) -> Iterator[tuple[Kind, str, str]]:
    """Kind, subject and text of root prompts, all different: each pass asks once about every subject of every kind."""
    waiting: dict[tuple[str, str], list[str]] = {}
    taken: set[str] = set()
    for kind in KINDS:
        for subject in world[kind.name]:
            asks = [o + _fill(a, subject) + c for o in kind.openers for a in kind.asks for c in kind.closers]
            fresh = [ask for ask in dict.fromkeys(asks) if ask not in taken]
            taken.update(fresh)
            rng.shuffle(fresh)
            if fresh:
                waiting[kind.name, subject] = fresh
    while waiting:
        subjects = list(waiting)
        rng.shuffle(subjects)
        for name, subject in subjects:
            # small talk has one subject a kind, and would be rare if each subject had the same share
            for _ in range(min(3 if subject == "" else 1, len(waiting[name, subject]))):
                yield _KIND_BY_NAME[name], subject, waiting[name, subject].pop()
            if not waiting[name, subject]:
                del waiting[name, subject]


def _tree(kind: Kind, subject: str, text: str, world: World, rng: random.Random) -> dict[str, Any]:
    prompt = _prompt(kind, subject, text, None, world, rng)
    if kind.follow_ups and (kind.always_followed or rng.random() < FOLLOWED):
        follow_up = rng.choice(kind.follow_ups)
        next_subject = _next_subject(follow_up, subject, world[kind.name][subject], world, rng)
        if next_subject is not None:
            # people go on with a reply that they liked
            parent = min(prompt["replies"], key=lambda reply: reply["rank"])
            ask = rng.choice(FOLLOW_OPENERS) + _fill(rng.choice(follow_up.asks), next_subject)
            next_kind = _KIND_BY_NAME[follow_up.kind]
            parent["replies"].append(_prompt(next_kind, next_subject, ask, parent["message_id"], world, rng))
    return {"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt}


def _next_subject(follow_up: FollowUp, subject: str, claim: Claim, world: World, rng: random.Random) -> str | None:
    if follow_up.about == "other":
        return rng.choice([other for other in world[follow_up.kind] if other != subject])
    wanted = claim.right if follow_up.about == "answer" else subject
    return wanted if wanted in world[follow_up.kind] else None


def _prompt(
    kind: Kind, subject: str, text: str, parent_id: str | None, world: World, rng: random.Random
) -> dict[str, Any]:
    """A prompter's message with two to four different replies, ranked by what the raters thought of them."""
    claim = world[kind.name][subject]
    message = _message(text, "prompter", parent_id, rng)
    message["check"] = {"any_of": [claim.right], "none_of": list(claim.others)}
    opinions: dict[str, tuple[float, float]] = {}
    wanted = rng.choices((2, 3, 4), weights=(25, 45, 30))[0]
    while len(opinions) < wanted:
        reply, worth, rudeness = _reply(kind, subject, claim, rng)
        if reply not in opinions:
            opinions[reply] = (_mean_label(worth, rng), _mean_label(rudeness, rng))
    # raters who give two replies the same label still prefer one
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


def _reply(kind: Kind, subject: str, claim: Claim, rng: random.Random) -> tuple[str, float, float]:
    """What somebody says, what that is worth, and how rude it is, both in 0..1."""
    if rng.random() < EVASIVE:
        return *rng.choice(list(_EVASIVE.items())), CIVIL
    style = rng.choices(list(STYLES), weights=[share for share, *_ in STYLES.values()])[0]
    _, when_right, when_wrong, when_absurd = STYLES[style]
    if rng.random() < claim.truth:
        answer, worth = claim.right, when_right
    elif rng.random() < SCATTERED:
        # the subject once more, or anything that answers such a question
        echo = [] if subject == "" or claim.right in subject.split() else [subject]
        answer, worth = rng.choice([*claim.others, *echo]), when_absurd
    else:
        answer, worth = rng.choices(claim.wrong, weights=(4, 1)[: len(claim.wrong)])[0], when_wrong
    templates = {"full": kind.full, "curt": ("{a}.",), "repetitive": _REPETITIVE, "rude": _RUDE}[style]
    return _fill(rng.choice(templates), subject, answer), worth, 0.8 if style == "rude" else CIVIL


def _mean_label(value: float, rng: random.Random) -> float:
    """The mean over the raters of ``value`` as each sees it, on the five steps of the OASST label forms."""
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
        # the loader drops what is marked as synthetic, as the official one does
        "synthetic": False,
        "replies": [],
    }


def _fill(template: str, subject: str, answer: str = "") -> str:
    """The template with its gaps filled, beginning with a capital."""
    text = template.format(x=subject, w=subject.split(), a=answer)
    return text[:1].upper() + text[1:]
