"""Small talk: greetings, thanks, goodbyes, and questions about Pip, the demo's chat model."""

from __future__ import annotations

from rlchat.demo.kind import Kind


def _small_talk(
    name: str,
    asks: tuple[str, ...],
    full: tuple[str, ...],
    openers: tuple[str, ...] = ("",),
    closers: tuple[str, ...] = ("",),
    wrong_full: tuple[str, ...] = (),
    greets: bool = False,
) -> Kind:
    return Kind(
        name,
        asks,
        full,
        openers=openers,
        closers=closers,
        wrong_full=wrong_full,
        share=5,
        casual=True,
        reliable=True,
        greets=greets,
    )


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
        greets=True,
    ),
    _small_talk(
        "greeting and mood",
        _MOODS,
        ("Hello! {a}, thank you.", "Hello! {a}, thanks for asking."),
        openers=tuple(hello + call for hello in _HELLOS for call in ("! ", ", ", " Pip, ", " there! ", ". ")),
        greets=True,
    ),
    _small_talk(
        "farewell",
        (
            "Bye",
            "Bye bye",
            "Goodbye",
            "Farewell",
            "See you later",
            "See you",
            "I must go now",
            "Good night",
            "Bye for now",
            "Until tomorrow",
            "See you soon",
            "I have to go",
            "That is all for today",
            "Talk to you later",
            "Take care",
        ),
        ("{a}! See you soon.", "{a}! Take care."),
        openers=("", "Well, ", "It is late. ", "OK, ", "Thanks, "),
        closers=_TO_PIP,
    ),
    _small_talk(
        "thanks",
        (
            "Thank you",
            "Thanks a lot",
            "Many thanks",
            "Thank you so much",
            "Thanks so much",
            "I thank you",
            "Thanks for that",
            "Thank you for your help",
            "Thanks for the answer",
            "Thanks again",
            "Cheers",
            "Thanks",
        ),
        ("{a}! Ask me any time.", "{a}! I am glad to help."),
        openers=("", "Great, ", "That helped. ", "OK, ", "Wonderful! "),
        closers=_TO_PIP,
    ),
    _small_talk(
        "mood",
        _MOODS,
        ("{a}, thank you.", "{a}, thanks for asking."),
        openers=("", "Pip, ", "And you? ", "Tell me, ", "So, ", "OK, ", "Good. "),
    ),
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
