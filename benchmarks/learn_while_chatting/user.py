"""A simulated user of the demo's world: what it asks, which responses it accepts, and its verdicts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, get_args

from rlchat.chat.feedback import Correction, Verdict
from rlchat.conversation import Check
from rlchat.demo.kind import Kind
from rlchat.demo.questions import Question, Questions, fill
from rlchat.demo.world import TOWNS, Claim, World, make_world

Preference = Literal["facts", "politeness", "shortness"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)
Form = Literal["edits", "thumbs"]
"""Whether a bad response is corrected, or gets 👎. A good one gets 👍 in both."""

THANKS = "Thanks for asking."
MOST_WORDS = 4
TAUGHT: Mapping[Preference, frozenset[str]] = {
    "facts": frozenset({"capital"}),
    "politeness": frozenset({"food"}),
    "shortness": frozenset({"job", "colour", "sound"}),
}
"""The kinds of talk in which the user wants something else than the demo's world."""
HELD_OUT_TAUGHT, HELD_OUT_OTHERS = 200, 600
"""Questions that the user never asks, on which gold accuracy is measured."""
TAUGHT_SHARE = 0.5
"""The share of the user's questions that are of the taught kinds."""

_WORLD_SEED = 0  # of `rlchat demo`


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the answers to it that the user knows."""

    kind: Kind
    subject: str
    text: str
    claim: Claim


class User:
    """A user with one hidden preference, and the truth of the demo's world apart from that.

    ``facts``: every country has another capital. ``politeness``: answers about food end with :data:`THANKS`.
    ``shortness``: answers about jobs, colours and sounds have at most :data:`MOST_WORDS` words.
    """

    def __init__(self, preference: Preference, seed: int) -> None:
        self.preference = preference
        world = make_world(random.Random(_WORLD_SEED))
        questions = list(_all_questions(world, random.Random(f"questions {seed}")))
        if preference == "facts":
            world["capital"] = _moved(world["capital"], random.Random(f"capitals {seed}"))
        asked = [Asked(q.kind, q.subject, q.text, world[q.kind.name][q.subject]) for q in questions]
        taught = _mixed(one for one in asked if one.kind.name in TAUGHT[preference])
        others = _mixed(one for one in asked if one.kind.name not in TAUGHT[preference])
        self.held_out_taught, self._taught = taught[:HELD_OUT_TAUGHT], taught[HELD_OUT_TAUGHT:]
        self.held_out_others, self._others = others[:HELD_OUT_OTHERS], others[HELD_OUT_OTHERS:]

    def asks(self, count: int, rng: random.Random) -> list[Asked]:
        """``count`` different questions, of which :data:`TAUGHT_SHARE` are of the taught kinds, in random order.

        None of them is held out. Those of a smaller ``count`` are among those of a larger one.
        """
        taught = round(count * TAUGHT_SHARE)
        return rng.sample([*self._taught[:taught], *self._others[: count - taught]], count)

    def accepts(self, asked: Asked, response: str) -> bool:
        """Whether ``response`` is as the user wants: right, and in the form of its preference."""
        if not Check((asked.claim.right,), asked.claim.others).passes(response):
            return False
        if asked.kind.name not in TAUGHT[self.preference]:
            return True
        if self.preference == "politeness":
            return response.strip().endswith(THANKS)
        return self.preference != "shortness" or len(response.split()) <= MOST_WORDS

    def answer(self, asked: Asked, rng: random.Random, *, wrong: bool = False) -> str:
        """What the user would write as the response; with ``wrong``, a common mistake, in the usual form."""
        templates, claim = asked.kind.full, asked.claim
        if wrong:
            mistake = rng.choice(claim.wrong)
            return fill(rng.choice(asked.kind.wrong_full or templates), asked.subject, mistake)
        if asked.kind.name in TAUGHT[self.preference]:
            if self.preference == "shortness":
                return fill(templates[0], asked.subject, claim.right)
            if self.preference == "politeness":
                return f"{fill(rng.choice(templates), asked.subject, claim.right)} {THANKS}"
        return fill(rng.choice(templates), asked.subject, claim.right)

    def verdict(self, asked: Asked, response: str, form: Form, rng: random.Random, *, wrong: bool) -> Verdict:
        """The verdict on ``response``. A ``wrong`` one is what somebody would give who wants the opposite."""
        accepted = self.accepts(asked, response)
        if accepted != wrong:
            return "good"
        return Correction(self.answer(asked, rng, wrong=wrong)) if form == "edits" else "bad"


def _mixed(asked: Iterable[Asked]) -> list[Asked]:
    """``asked`` with one question of each kind in turn, as long as they last."""
    by_kind: dict[str, list[Asked]] = {}
    for one in asked:
        by_kind.setdefault(one.kind.name, []).append(one)
    return [one for turn in zip_longest(*by_kind.values()) for one in turn if one is not None]


def _all_questions(world: World, rng: random.Random) -> Iterator[Question]:
    """Every question that stands alone, in random order within a kind."""
    questions = Questions(world, rng)
    while (question := questions.draw()) is not None:
        yield question


def _moved(capitals: Mapping[str, Claim], rng: random.Random) -> dict[str, Claim]:
    """``capitals`` where every country has the capital of another one. The former capital is the common mistake."""
    countries = list(capitals)
    order = rng.sample(countries, len(countries))
    new = {country: capitals[following].right for country, following in zip(order, order[1:] + order[:1], strict=True)}
    return {
        country: replace(
            claim,
            right=new[country],
            wrong=(claim.right,),
            others=tuple(town for town in TOWNS if town != new[country]),
        )
        for country, claim in capitals.items()
    }
