"""The kinds of talk in the demo: how questions are asked, how complete replies sound, and what may follow.

In the templates ``{x}`` is the subject, ``{w}`` the list of its words, and ``{a}`` an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENERS = ("", "Hi! ", "Hello, Pip. ", "Excuse me. ", "I have a question. ", "Please help me. ")
CLOSERS = ("", " Do you know?", " Thanks!", " I forgot.", " I am curious.")
FOLLOW_OPENERS = ("", "Good. ", "I see. ", "Thanks! ")
CHANGE_OPENERS = ("Thanks! ", "I see. ", "Good to know. ", "Another question. ", "OK. ")
"""Before a question that has nothing to do with the turn before it."""


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A question that only makes sense after the turn before it.

    It asks for ``kind``'s answer: about the subject of that turn, about its answer, or about another subject.
    """

    kind: str
    about: str  # "same", "answer" or "other"
    asks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of talk.

    ``share`` is the mean number of questions about each subject in one pass over all subjects. ``wrong_full`` holds
    complete sentences around a wrong answer where it does not fit those of a right one. Questions of a ``casual`` kind
    are sometimes typed in lower case and without punctuation. A kind that is ``reliable`` has no mistake that
    outnumbers the truth.
    """

    name: str
    asks: tuple[str, ...]  # none for what is only asked as a follow-up
    full: tuple[str, ...]  # complete replies
    follow_ups: tuple[FollowUp, ...] = ()
    always_followed: bool = False
    openers: tuple[str, ...] = OPENERS
    closers: tuple[str, ...] = CLOSERS
    wrong_full: tuple[str, ...] = ()
    share: float = 1.0
    casual: bool = False
    reliable: bool = False
    opening: bool = False  # only begins a conversation


def _small_talk(
    name: str,
    asks: tuple[str, ...],
    full: tuple[str, ...],
    openers: tuple[str, ...] = ("",),
    closers: tuple[str, ...] = ("",),
    wrong_full: tuple[str, ...] = (),
    opening: bool = False,
) -> Kind:
    return Kind(
        name,
        asks,
        full,
        openers=openers,
        closers=closers,
        wrong_full=wrong_full,
        share=6,
        casual=True,
        reliable=True,
        opening=opening,
    )


_AND = ("And {x}?", "What about {x}?", "And how about {x}?")
_AND_A = ("And a {x}?", "What about a {x}?", "And how about a {x}?")
_HI = ("", "Hi! ", "Hello! ", "Hey, ", "Hi, ", "Hello Pip, ", "Excuse me, ", "So, ")
_ENDS = ("!", ".", "")
_TO_PIP = tuple(name + end for name in ("", ", Pip", ", my friend", ", dear Pip") for end in _ENDS)
_CALLS = (*_TO_PIP, *(name + end for name in (" Pip", " there", " again", " everyone") for end in _ENDS))
_HELLOS = ("Hello", "Hi", "Hey", "Good day", "Greetings", "Good afternoon", "Good evening", "Hiya", "Hello hello")
_MOODS = (
    "How are you?",
    "How are you today?",
    "How do you feel?",
    "How do you feel today?",
    "How is it going?",
    "How's it going today?",
    "How are things?",
    "How are you feeling?",
    "How is your day?",
    "How have you been?",
    "Are you well?",
    "Are you doing well?",
    "What's up?",
)

SMALL_TALK: tuple[Kind, ...] = (
    _small_talk(
        "greeting",
        (*_HELLOS, "Good morning to you", "Hello, nice to see you", "Hi, good to see you", "Nice to meet you"),
        ("{a}! How can I help you?", "{a}! What can I do for you?"),
        openers=("", "Oh! ", "Ah, "),
        closers=_CALLS,
        opening=True,
    ),
    _small_talk(
        "greeting and mood",
        _MOODS,
        ("Hello! {a}, thank you.", "Hello! {a}, thanks for asking."),
        openers=tuple(hello + call for hello in _HELLOS for call in ("! ", ", ", " Pip, ", " there! ", ". ")),
        opening=True,
    ),
    _small_talk(
        "farewell",
        ("Bye", "Bye bye", "Goodbye", "Farewell", "See you later", "See you", "I must go now", "Good night", "Bye for now")
        + ("Until tomorrow", "See you soon", "I have to go", "That is all for today", "Talk to you later", "Take care"),
        ("{a}! See you soon.", "{a}! Take care."),
        openers=("", "Well, ", "It is late. ", "OK, ", "Thanks, "),
        closers=_TO_PIP,
    ),
    _small_talk(
        "thanks",
        ("Thank you", "Thanks a lot", "Many thanks", "Thank you so much", "Thanks so much", "I thank you")
        + ("Thanks for that", "Thank you for your help", "Thanks for the answer", "Thanks again", "Cheers", "Thanks"),
        ("{a}! Ask me any time.", "{a}! I am glad to help."),
        openers=("", "Great, ", "That helped. ", "OK, ", "Wonderful! "),
        closers=_TO_PIP,
    ),
    _small_talk("mood", _MOODS, ("{a}, thank you.", "{a}, thanks for asking."), openers=("", "Pip, ", "And you? ", "Tell me, ", "So, ", "OK, ", "Good. ")),
    _small_talk(
        "identity",
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "What are you called?",
            "Tell me your name.",
            "Tell me about yourself.",
            "Do you have a name?",
            "May I ask your name?",
            "Who am I speaking to?",
            "Who is there?",
            "Who is this?",
            "Are you a person?",
            "Are you human?",
            "Are you a machine?",
            "Are you a chat bot?",
            "Are you an AI?",
            "Are you real?",
            "What should I call you?",
            "Please introduce yourself.",
            "What kind of program are you?",
        ),
        ("My name is {a}.", "I am {a}, a small chat model."),
        openers=_HI,
    ),
    _small_talk(
        "abilities",
        (
            "What do you do?",
            "What can you tell me?",
            "What can you talk about?",
            "What can we talk about?",
            "What can I ask?",
            "What may I ask you?",
            "What do you know?",
            "What are you good at?",
            "What are your skills?",
            "What are you for?",
            "What should I ask you?",
            "What questions can you answer?",
            "What topics do you know?",
            "How can you help me?",
            "How do you help people?",
            "Can you help?",
            "Could you help me?",
            "I need help.",
            "Help me.",
            "How does this work?",
            "How do I use you?",
            "What can I do here?",
        ),
        ("I can {a} and its neighbours.", "I can {a} and add small numbers."),
        openers=_HI,
        wrong_full=("I can {a}.", "I can {a} very well."),
    ),
)

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
    ),
    Kind(
        "day before",
        (
            "Which day comes before {x}?",
            "What day is before {x}?",
            "What is the day before {x}?",
            "Today is {x}. What day was yesterday?",
        ),
        ("Before {x} comes {a}.", "The day before {x} is {a}."),
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
        "Can you add {w[0]} and {w[2]}?",
        "{w[0]} + {w[2]} = ?",
    ),
    ("That makes {a}.", "{w[0]} + {w[2]} = {a}."),
    openers=("", "Hi! ", "Excuse me. "),
    closers=("",),
    share=0.5,
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
        opening=True,
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
        opening=True,
    ),
    Kind("recall name", (), ("Your name is {a}.", "You are {a}.")),
    Kind("recall pet", (), ("Your {w[0]} is called {a}.", "The name of your pet is {a}.")),
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
