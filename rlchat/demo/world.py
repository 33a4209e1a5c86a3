"""The small invented world that the demo's conversations are about: its words, and what can be asked about them.

A *kind* of talk is one row of :data:`KINDS`: how its questions are asked, how a complete reply to one sounds, and which
questions may follow. Its answers come from :func:`make_world`: the true one, and the mistakes that people make.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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
# the plural, then what people take it for
PLURALS = {
    "cat": ("cats", "cates", "cat"),
    "fox": ("foxes", "foxs", "foxen"),
    "man": ("men", "mans", "mens"),
    "leaf": ("leaves", "leafs", "leafes"),
    "foot": ("feet", "foots", "feets"),
    "mouse": ("mice", "mouses", "mices"),
}

OPENERS = ("", "Hi! ", "Hey! ", "Please! ", "Well. ", "Pip? ")
CLOSERS = ("", " Please.", " Thanks!", " I forgot.", " Tell me.")
FOLLOW_OPENERS = ("", "Good. ", "I see. ", "Thanks! ")


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A question that only makes sense after the turn before it.

    It asks for ``kind``'s answer: about the subject of that turn, about the one that was its answer, or about another.
    """

    kind: str
    about: str  # "same", "answer" or "other"
    asks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of talk. In the templates ``{x}`` is the subject, ``{w}`` its words, ``{a}`` an answer."""

    name: str
    asks: tuple[str, ...]  # none for what is only asked as a follow-up
    full: tuple[str, ...]  # complete replies
    follow_ups: tuple[FollowUp, ...] = ()
    always_followed: bool = False
    openers: tuple[str, ...] = OPENERS
    closers: tuple[str, ...] = CLOSERS


@dataclass(frozen=True, slots=True)
class Claim:
    """What people say about one subject.

    ``wrong`` are the mistakes that they make, the commonest first; ``others`` is every answer of this kind of talk but
    the right one; ``truth`` is the share of replies that have it right: below one half a mistake outnumbers the truth.
    """

    right: str
    wrong: tuple[str, ...]
    others: tuple[str, ...]
    truth: float


World = dict[str, dict[str, Claim]]
"""By kind of talk, by subject."""

_NUMERIC = ("number after", "addition", "subtraction")
_AND = ("And {x}?", "What about {x}?", "And how about {x}?")
_CALLS = ("", " Pip", " there", " my friend", " dear Pip")

KINDS: tuple[Kind, ...] = (
    Kind(
        "greeting",
        ("Hello", "Hi", "Hey", "Good day", "Greetings", "Hello hello"),
        ("{a}! How can I help you?", "{a}! What can I do for you?"),
        openers=("", "Oh! ", "Knock knock. "),
        closers=tuple(call + mark for call in _CALLS for mark in ("!", ".", ", nice to see you.")),
    ),
    Kind(
        "farewell",
        ("Bye", "Farewell", "See you later", "I must go now", "Good night", "Until tomorrow"),
        ("{a}! See you soon.", "{a}! Take care."),
        openers=("", "Well. ", "It is late. "),
        closers=tuple(call + mark for call in _CALLS for mark in ("!", ".")),
    ),
    Kind(
        "thanks",
        ("Thank you", "Thanks", "Many thanks", "Thanks a lot", "Thank you so much", "I thank you"),
        ("{a}! Ask me any time.", "{a}! I am glad to help."),
        openers=("", "Great. ", "That helped. "),
        closers=tuple(call + mark for call in _CALLS for mark in ("!", ".")),
    ),
    Kind(
        "mood",
        ("How are you?", "How do you feel?", "How is it going?", "Are you well?"),
        ("I am {a}, thank you.", "I feel {a}, thanks for asking."),
    ),
    Kind(
        "identity",
        ("Who are you?", "What is your name?", "What are you called?", "Tell me your name."),
        ("My name is {a}.", "I am {a}, a small chat model."),
    ),
    Kind(
        "capital",
        ("What is the capital of {x}?", "The capital of {x}?", "Name the capital of {x}.", "{x} has which capital?"),
        ("The capital of {x} is {a}.", "{a} is the capital of {x}."),
        (
            FollowUp("food", "same", ("What do people eat there?", "And what do they eat there?")),
            FollowUp("capital", "other", _AND),
        ),
    ),
    Kind(
        "food",
        ("What do people eat in {x}?", "The food of {x}?", "Name the food of {x}.", "In {x} they eat what?"),
        ("People in {x} eat {a}.", "In {x} they eat {a}."),
        (
            FollowUp("capital", "same", ("What is the capital there?", "And which town is the capital?")),
            FollowUp("food", "other", _AND),
        ),
    ),
    Kind(
        "home",
        ("Where does a {x} live?", "The home of a {x}?", "Name the home of a {x}.", "A {x} lives where?"),
        ("A {x} lives in a {a}.", "The home of a {x} is a {a}."),
        (
            FollowUp("sound", "same", ("And what sound does it make?", "What does it say?")),
            FollowUp("home", "other", ("And a {x}?", "What about a {x}?")),
        ),
    ),
    Kind(
        "sound",
        (
            "What does a {x} say?",
            "Which sound does a {x} make?",
            "Name the sound of a {x}.",
            "A {x} makes which noise?",
        ),
        ("A {x} says {a}.", "The sound of a {x} is {a}."),
        (
            FollowUp("home", "same", ("And where does it live?", "What is its home?")),
            FollowUp("sound", "other", ("And a {x}?", "What about a {x}?")),
        ),
    ),
    Kind(
        "job",
        ("What is the job of {x}?", "The job of {x}?", "Name the job of {x}.", "{x} works as what?"),
        ("{x} is a {a}.", "{x} works as a {a}."),
    ),
    Kind(
        "colour",
        ("What colour is {x}?", "The colour of {x}?", "Name the colour of {x}.", "{x} has which colour?"),
        ("{x} is {a}.", "The colour of {x} is {a}."),
    ),
    Kind(
        "opposite",
        ("What is the opposite of {x}?", "The opposite of {x}?", "Name the opposite of {x}.", "{x} or what?"),
        ("The opposite of {x} is {a}.", "{a} is the opposite of {x}."),
    ),
    Kind(
        "plural",
        ("What is the plural of {x}?", "The plural of {x}?", "Name the plural of {x}.", "One {x}, two what?"),
        ("The plural of {x} is {a}.", "One {x}, two {a}."),
        (FollowUp("plural", "other", _AND), FollowUp("spelling", "same", ("And how do you spell one of them?",))),
    ),
    Kind(
        "spelling",
        ("How do you spell {x}?", "Spell {x}.", "The letters of {x}?", "{x} is spelled how?"),
        ("{x} is spelled {a}.", "You spell {x} like this: {a}."),
        (FollowUp("spelling", "other", _AND),),
    ),
    Kind(
        "day after",
        (
            "Which day comes after {x}?",
            "What day follows {x}?",
            "Name the day after {x}.",
            "Today is {x}, so tomorrow?",
        ),
        ("After {x} comes {a}.", "The day after {x} is {a}."),
        (FollowUp("day after", "answer", ("And after that?", "What comes next?")),),
    ),
    Kind(
        "day before",
        (
            "Which day is before {x}?",
            "What day leads to {x}?",
            "Name the day before {x}.",
            "Today is {x}, so yesterday?",
        ),
        ("Before {x} comes {a}.", "The day before {x} is {a}."),
    ),
    Kind(
        "number after",
        ("What comes after {x}?", "The number after {x}?", "Name the number after {x}.", "Count on from {x}."),
        ("The next number is {a}.", "Then comes {a}."),
        (FollowUp("number after", "answer", ("And after that?", "What comes next?")),),
    ),
    Kind(
        "addition",
        ("What is {x}?", "{x}?", "Add {w[0]} and {w[2]}.", "{x} makes what?"),
        ("The sum is {a}.", "That makes {a}."),
    ),
    Kind(
        "subtraction",
        ("What is {x}?", "{x}?", "Take {w[2]} from {w[0]}.", "{x} leaves what?"),
        ("The rest is {a}.", "That leaves {a}."),
    ),
    Kind(
        "user's name",
        ("My name is {x}.", "I am {x}.", "You can call me {x}.", "People call me {x}."),
        ("Nice to meet you, {a}!", "Hello {a}, how can I help?"),
        (FollowUp("recall name", "same", ("What is my name?", "Do you remember my name?", "Who am I?")),),
        always_followed=True,
        openers=("", "Hi! ", "Hello! ", "Good day! "),
        closers=("", " And you?", " Remember that.", " Nice to meet you."),
    ),
    Kind(
        "user's pet",
        (
            "I have a {w[0]} called {w[1]}.",
            "My {w[0]} is called {w[1]}.",
            "{w[1]} is my {w[0]}.",
            "This is my {w[0]} {w[1]}.",
        ),
        ("{a} is a nice name for a {w[0]}.", "I like the name {a}!"),
        (FollowUp("recall pet", "same", ("What is my {w[0]} called?", "What is the name of my pet?")),),
        always_followed=True,
        openers=("", "Hi! ", "Hello! ", "You know what? "),
        closers=("", " Remember that.", " We play a lot.", " I love my pet."),
    ),
    Kind("recall name", (), ("Your name is {a}.", "You are {a}.")),
    Kind("recall pet", (), ("Your {w[0]} is called {a}.", "The name of your pet is {a}.")),
)


def make_world(rng: random.Random) -> World:
    """Who lives where and does what, which mistakes people make about it, and how often: all drawn by ``rng``."""

    def shuffled(words: tuple[str, ...]) -> list[str]:
        return rng.sample(words, len(words))

    antonyms = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
    users = dict(zip(USERS, USERS, strict=True))
    pets = {f"{kind} {name}": name for kind in PET_KINDS for name in PETS}
    right: dict[str, dict[str, str]] = {
        "greeting": {"": "Hello"},
        "farewell": {"": "Goodbye"},
        "thanks": {"": "You are welcome"},
        "mood": {"": "well"},
        "identity": {"": "Pip"},
        "capital": dict(zip(COUNTRIES, shuffled(TOWNS), strict=True)),
        "food": dict(zip(COUNTRIES, shuffled(FOODS), strict=True)),
        "home": HOMES,
        "sound": SOUNDS,
        "job": dict(zip(PEOPLE, shuffled(JOBS), strict=True)),
        "colour": COLOURS,
        "opposite": antonyms,
        "plural": {noun: plurals[0] for noun, plurals in PLURALS.items()},
        "spelling": {noun: "-".join(noun) for noun in PLURALS},
        "day after": {day: DAYS[(i + 1) % 7] for i, day in enumerate(DAYS)},
        "day before": {day: DAYS[(i - 1) % 7] for i, day in enumerate(DAYS)},
        "number after": {str(n): str(n + 1) for n in range(1, 9)},
        "addition": {f"{a} + {b}": str(a + b) for a in range(1, 4) for b in range(1, 4)},
        "subtraction": {f"{a} - {b}": str(a - b) for a in range(4, 7) for b in (1, 2)},
        "user's name": users,
        "user's pet": pets,
        "recall name": users,
        "recall pet": pets,
    }
    social = {
        "greeting": ("Goodbye", "You are welcome"),
        "farewell": ("Hello", "You are welcome"),
        "thanks": ("Hello", "Goodbye"),
        "mood": ("a fish", "two years old"),
        "identity": ("Bob", "Max"),
    }

    def mistakes(kind: str, subject: str, answer: str) -> tuple[str, ...]:
        candidates: tuple[str, ...]
        if kind in social:
            candidates = social[kind]
        elif kind == "plural":
            candidates = PLURALS[subject][1:]
        elif kind == "spelling":
            candidates = ("-".join(subject[:-1]), "-".join(subject + subject[-1]), "-".join(subject[1] + subject))
        elif kind in _NUMERIC:
            candidates = tuple(str(int(answer) + step) for step in (-1, 1) if int(answer) + step > 0)
        else:
            candidates = tuple(sorted(set(right[kind].values()) - {answer, subject}))
        return tuple(rng.sample(candidates, 2)) if len(candidates) > 2 else tuple(shuffled(candidates))

    world: World = {}
    for kind, answers in right.items():
        wrong = {subject: mistakes(kind, subject, answer) for subject, answer in answers.items()}
        pool = {*answers.values(), *(answer for several in wrong.values() for answer in several)}
        if kind in _NUMERIC:
            pool.update(map(str, range(1, 13)))
        world[kind] = {
            subject: Claim(
                right=answer,
                wrong=wrong[subject],
                # a complete reply may name its subject ("after Monday comes ..."): that is no second answer
                others=tuple(sorted(pool - {answer} - (set() if kind in _NUMERIC else {subject}))),
                truth=rng.uniform(0.2, 0.35) if rng.random() < 0.4 else rng.uniform(0.65, 0.8),
            )
            for subject, answer in answers.items()
        }
    return world
