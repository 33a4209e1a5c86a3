"""The small invented world that the demo's conversations are about: its words, its facts, and people's mistakes.

:func:`make_world` draws the true answer to each question, and the mistakes that people make about it. How questions are
asked is in :mod:`rlchat.demo.kinds`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rlchat.demo.kinds import KINDS

COUNTRIES = ("Belan", "Corvia", "Dromand", "Estora", "Fenwick", "Galdor")
TOWNS = ("Tova", "Mirel", "Quint", "Sabro", "Lunden", "Parvos")
FOODS = ("bread", "rice", "soup", "beans", "cheese", "plums")
PEOPLE = ("Ada", "Boris", "Clara", "Dmitri", "Elsa", "Felix")
JOBS = ("baker", "pilot", "doctor", "farmer", "painter", "teacher")
USERS = ("Mila", "Otto", "Nina", "Paul", "Rosa", "Sven")
PETS = ("Rex", "Luna")
PET_KINDS = ("dog", "cat")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOMES = {
    "bee": "hive",
    "bird": "nest",
    "dog": "kennel",
    "cow": "barn",
    "duck": "pond",
    "pig": "sty",
}
SOUNDS = {
    "bee": "buzz",
    "bird": "tweet",
    "dog": "woof",
    "cow": "moo",
    "duck": "quack",
    "pig": "oink",
}
COLOURS = {
    "snow": "white",
    "grass": "green",
    "coal": "black",
    "the sky": "blue",
    "a lemon": "yellow",
    "a carrot": "orange",
}
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("wet", "dry"),
    ("old", "new"),
    ("high", "low"),
)
# the plural, then common mistakes
PLURALS = {
    "cat": ("cats", "cates", "cat"),
    "fox": ("foxes", "foxs", "foxen"),
    "man": ("men", "mans", "mens"),
    "leaf": ("leaves", "leafs", "leafes"),
    "foot": ("feet", "foots", "feets"),
    "mouse": ("mice", "mouses", "mices"),
}

SMALL_TALK: dict[str, tuple[str, tuple[str, ...]]] = {
    "greeting": ("Hello", ("Goodbye", "You are welcome")),
    "greeting and mood": ("I am well", ("I am a fish", "I am two years old")),
    "farewell": ("Goodbye", ("Hello", "You are welcome")),
    "thanks": ("You are welcome", ("Hello", "Goodbye")),
    "mood": ("I am well", ("I am a fish", "I am two years old")),
    "identity": ("Pip", ("Bob", "Max")),
    "abilities": ("talk about Belan", ("fly a plane", "cook soup")),
    "outside world": (
        "I only know about Belan",
        ("bread", "Tova", "white", "moo", "Monday", "seven", "a baker", "a nest", "Elsa", "cold"),
    ),
}
"""The right reply and the wrong ones, by kind of talk, where a kind has one right reply to everything."""

MISLED = 0.33
"""The share of facts about which a mistake is more common than the truth, outside of what people know well."""

_NUMERIC = ("number after", "addition")
_KINDS_BY_NAME = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Claim:
    """What people say about one subject.

    ``wrong`` are their mistakes, the most common first; ``others`` is every answer of this kind of talk except the
    right one; ``truth`` is the share of replies that are right: below one half, mistakes outnumber the truth.
    """

    right: str
    wrong: tuple[str, ...]
    others: tuple[str, ...]
    truth: float


World = dict[str, dict[str, Claim]]
"""Claims by kind of talk and subject. Small talk has the single subject ``""``."""


def make_world(rng: random.Random) -> World:
    """Draws the facts, the mistakes that people make about them, and how common these are."""
    truths = _true_answers(rng)
    return {kind: _claims(kind, answers, rng) for kind, answers in truths.items()}


def _true_answers(rng: random.Random) -> dict[str, dict[str, str]]:
    """The right answer by kind of talk and subject."""

    def shuffled(words: tuple[str, ...]) -> list[str]:
        return rng.sample(words, len(words))

    users = dict(zip(USERS, USERS, strict=True))
    pets = {f"{kind} {name}": name for kind in PET_KINDS for name in PETS}
    return {
        **{kind: {"": right} for kind, (right, _) in SMALL_TALK.items()},
        "capital": dict(zip(COUNTRIES, shuffled(TOWNS), strict=True)),
        "food": dict(zip(COUNTRIES, shuffled(FOODS), strict=True)),
        "home": HOMES,
        "sound": SOUNDS,
        "job": dict(zip(PEOPLE, shuffled(JOBS), strict=True)),
        "colour": COLOURS,
        "opposite": {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])},
        "plural": {noun: plurals[0] for noun, plurals in PLURALS.items()},
        "spelling": {noun: "-".join(noun) for noun in PLURALS},
        "day after": {day: DAYS[(i + 1) % 7] for i, day in enumerate(DAYS)},
        "number after": {str(n): str(n + 1) for n in range(1, 9)},
        "addition": {f"{a} + {b}": str(a + b) for a in range(1, 10) for b in range(1, 10)},
        "user's name": users,
        "user's pet": pets,
        "recall name": users,
        "recall pet": pets,
    }


def _claims(kind: str, answers: dict[str, str], rng: random.Random) -> dict[str, Claim]:
    wrong = {subject: _mistakes(kind, subject, answer, answers, rng) for subject, answer in answers.items()}
    pool = {*answers.values(), *(answer for several in wrong.values() for answer in several)}
    if kind in _NUMERIC:
        pool.update(map(str, range(1, 20)))
    claims = {}
    for subject, answer in answers.items():
        # A complete reply may repeat its subject ("After Monday comes ...", "3 + 4 = 7"): that is no second answer.
        repeated = {subject, *subject.split()}
        claims[subject] = Claim(
            right=answer,
            wrong=wrong[subject],
            others=tuple(sorted(pool - {answer} - repeated)),
            truth=_truth(kind, rng),
        )
    return claims


def _truth(kind: str, rng: random.Random) -> float:
    misled = rng.random() < MISLED
    if _KINDS_BY_NAME[kind].reliable:
        return rng.uniform(0.95, 0.99)
    return rng.uniform(0.3, 0.42) if misled else rng.uniform(0.65, 0.8)


def _mistakes(kind: str, subject: str, answer: str, answers: dict[str, str], rng: random.Random) -> tuple[str, ...]:
    """Wrong answers about ``subject``, the most common first: two, or fewer where no others are plausible."""
    candidates: tuple[str, ...]
    if kind == "outside world":
        return SMALL_TALK[kind][1]
    if kind in SMALL_TALK:
        candidates = SMALL_TALK[kind][1]
    elif kind == "plural":
        candidates = PLURALS[subject][1:]
    elif kind == "spelling":
        candidates = ("-".join(subject[:-1]), "-".join(subject + subject[-1]), "-".join(subject[1] + subject))
    elif kind == "addition":
        # Some people write the digits side by side: 3 + 4 = 34.
        first, _, second = subject.split()
        candidates = tuple(dict.fromkeys((first + second, second + first)))
    elif kind in _NUMERIC:
        candidates = tuple(str(int(answer) + step) for step in (-1, 1) if int(answer) + step > 0)
    elif kind == "day after":
        # The day before, or one day too far.
        candidates = tuple(DAYS[(DAYS.index(subject) + days) % 7] for days in (-1, 2))
    else:
        candidates = tuple(sorted(set(answers.values()) - {answer, subject}))
    return tuple(rng.sample(candidates, min(2, len(candidates))))
