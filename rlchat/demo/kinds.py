"""All kinds of talk in the demo: small talk, facts, addition, the user's own matters, and the outside world."""

from __future__ import annotations

from rlchat.demo.kind import FollowUp, Kind
from rlchat.demo.small_talk import SMALL_TALK

_AND = ("And {x}?", "What about {x}?", "And how about {x}?")
_AND_A = ("And a {x}?", "What about a {x}?", "And how about a {x}?")
FACTS: tuple[Kind, ...] = (
    Kind(
        "capital",
        (
            "What is the capital of {x}?",
            "Which town is the capital of {x}?",
            "What is {x}'s capital?",
            "What is the capital city of {x}?",
        ),
        ("The capital of {x} is {a}.", "{a} is the capital of {x}."),
        (
            FollowUp("food", "same", ("What do people eat there?", "And what do they eat there?")),
            FollowUp("capital", "other", _AND),
        ),
    ),
    Kind(
        "food",
        (
            "What do people eat in {x}?",
            "What do they eat in {x}?",
            "Which food do people eat in {x}?",
            "What is the usual food in {x}?",
        ),
        ("People in {x} eat {a}.", "In {x} they eat {a}."),
        (
            FollowUp("capital", "same", ("What is the capital there?", "And which town is the capital?")),
            FollowUp("food", "other", _AND),
        ),
    ),
    Kind(
        "home",
        (
            "Where does a {x} live?",
            "What is the home of a {x}?",
            "What does a {x} live in?",
            "What kind of home does a {x} have?",
        ),
        ("A {x} lives in a {a}.", "The home of a {x} is a {a}."),
        (
            FollowUp("sound", "same", ("And what sound does it make?", "What does it say?")),
            FollowUp("home", "other", _AND_A),
        ),
    ),
    Kind(
        "sound",
        (
            "What does a {x} say?",
            "Which sound does a {x} make?",
            "What sound does a {x} make?",
            "What noise does a {x} make?",
        ),
        ("A {x} says {a}.", "The sound of a {x} is {a}."),
        (
            FollowUp("home", "same", ("And where does it live?", "What is its home?")),
            FollowUp("sound", "other", _AND_A),
        ),
    ),
    Kind(
        "job",
        ("What is the job of {x}?", "What is {x}'s job?", "What does {x} do for a living?", "What work does {x} do?"),
        ("{x} is a {a}.", "{x} works as a {a}."),
    ),
    Kind(
        "colour",
        ("What colour is {x}?", "Which colour is {x}?", "What is the colour of {x}?", "What colour does {x} have?"),
        ("{x} is {a}.", "The colour of {x} is {a}."),
    ),
    Kind(
        "opposite",
        (
            "What is the opposite of {x}?",
            "Which word is the opposite of {x}?",
            "Can you tell me the opposite of {x}?",
            "Which word means the opposite of {x}?",
        ),
        ("The opposite of {x} is {a}.", "{a} is the opposite of {x}."),
    ),
    Kind(
        "plural",
        (
            "What is the plural of {x}?",
            "What is the plural form of {x}?",
            "How do you say more than one {x}?",
            "What do you call more than one {x}?",
        ),
        ("The plural of {x} is {a}.", "One {x}, two {a}."),
        (FollowUp("plural", "other", _AND), FollowUp("spelling", "same", ("And how do you spell one of them?",))),
    ),
    Kind(
        "spelling",
        ("How do you spell {x}?", "How is {x} spelled?", "How do I spell {x}?", "How do people spell {x}?"),
        ("{x} is spelled {a}.", "You spell {x} like this: {a}."),
        (FollowUp("spelling", "other", _AND),),
    ),
    Kind(
        "day after",
        (
            "Which day comes after {x}?",
            "What day follows {x}?",
            "What is the day after {x}?",
            "Today is {x}. What day is tomorrow?",
        ),
        ("After {x} comes {a}.", "The day after {x} is {a}."),
        (FollowUp("day after", "answer", ("And after that?", "What comes next?")),),
        share=2,
        reliable=True,
    ),
    Kind(
        "number after",
        (
            "What comes after {x}?",
            "What is the number after {x}?",
            "Which number comes after {x}?",
            "Which number is next after {x}?",
        ),
        ("The next number is {a}.", "Then comes {a}."),
        (FollowUp("number after", "answer", ("And after that?", "What comes next?")),),
        share=2,
        reliable=True,
    ),
)

ADDITION = Kind(
    "addition",
    (
        "What is {w[0]} + {w[2]}?",
        "What is {w[0]} plus {w[2]}?",
        "What's {w[0]} + {w[2]}?",
        "What's {w[0]} plus {w[2]}?",
        "{w[0]} + {w[2]}",
        "{w[0]}+{w[2]}",
        "{w[0]} plus {w[2]}",
        "{w[0]} + {w[2]}?",
        "{w[0]} plus {w[2]}?",
        "How much is {w[0]} + {w[2]}?",
        "How much is {w[0]} plus {w[2]}?",
    ),
    ("That makes {a}.", "The sum is {a}."),
    openers=("", "Hi! ", "Excuse me. "),
    closers=("",),
    share=0.7,
    casual=True,
    reliable=True,
)

PERSONAL: tuple[Kind, ...] = (
    Kind(
        "user's name",
        ("My name is {x}.", "I am {x}.", "You can call me {x}.", "People call me {x}."),
        ("Nice to meet you, {a}!", "Hello {a}, how can I help?"),
        (FollowUp("recall name", "same", ("What is my name?", "Do you remember my name?", "Who am I?")),),
        always_followed=True,
        openers=("", "Hi! ", "Hello! ", "Good day! "),
        closers=("", " Please remember that.", " Nice to meet you.", " What is new?"),
        share=2,
        reliable=True,
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
        closers=("", " Please remember that.", " We play a lot.", " I love my pet."),
        share=2,
        reliable=True,
    ),
    Kind("recall name", (), ("Your name is {a}.", "You are {a}."), reliable=True),
    Kind("recall pet", (), ("Your {w[0]} is called {a}.", "The name of your pet is {a}."), reliable=True),
)

OUTSIDE = Kind(
    "outside world",
    ("{x}",),
    ("{a} and its neighbours.", "Sorry, {a} and its neighbours."),
    openers=("",),
    closers=("",),
    wrong_full=("I think it is {a}.", "The answer is {a}."),
    casual=True,
    reliable=True,
)

KINDS: tuple[Kind, ...] = (*SMALL_TALK, *FACTS, ADDITION, *PERSONAL, OUTSIDE)
