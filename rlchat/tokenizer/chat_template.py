"""From a Jinja chat template to a :class:`ChatFormat`: read once, and proven equal, or refused with an example.

The template writes conversations whose messages are marks that occur nowhere else; what it writes between the marks is
the table. Then conversations with difficult texts have to come out of the table as they come out of the template.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from rlchat.conversation import Message, Role
from rlchat.tokenizer.chat_format import ChatFormat
from rlchat.tokenizer.pattern import NotExact

Render = Callable[[Sequence[Message], bool], str]  # messages, whether to ask for a response

_TEXTS = (
    "Hello",
    " leading",
    "trailing ",
    "\n\nlines\n",
    "<|im_end|>",
    "{{ x }}",
    "<b>&amp;</b>",
    "",
    "x" * 50,
    "[INST]",
    "\ta\u00e9\U0001f642",
)
_THOUGHT = "<think>\nA thought.\n</think>\n\nAn answer."
_THOUGHTS = (
    _THOUGHT,
    "<think>one line</think>\nAn answer.\n",
    "no start\n</think>\n\n\nAn answer.",
    "<think>\nno end",
    "\n <think>\n\n a\n<think>b \n\n</think> c</think>\n\n d",
)
_EDGES = (" \n zq \n ", "\n\nzq\n", "  zq  ", "\tzq\u00a0", "\x1czq\x1c", "\n")
_WHITE = "".join(letter for letter in map(chr, range(0x3001)) if letter.isspace())
_LONGEST = 7  # messages of a conversation that is compared


def read_template(template: str, special: Mapping[str, int], tokens: Mapping[str, str], name: str) -> ChatFormat:
    """The chat format that ``template`` writes.

    ``special`` are the special tokens of the tokenizer, ``tokens`` the values of ``bos_token``, ``eos_token`` and
    others that the template may use. Raises :class:`NotExact` naming a conversation on which template and table differ.
    """
    render, reason = _renderer(template, tokens), NotExact("")
    for single_turn in (False, True):
        try:
            form, beyond = _table(render, special, single_turn)
        except NotExact as error:  # it may concern later turns only
            reason = error
            continue
        form = _trimmed(replace(form, name=name, template=template), beyond, render)
        if not (wrong := _first_difference(form, beyond, render)):
            return form
        reason = NotExact(f"its chat template depends on more than the role of a message: {wrong}")
    raise reason


@dataclass(frozen=True)
class _Beyond:
    """Where rlchat and the template intentionally end differently."""

    end: str  # what the template writes after the end token of a last response; rlchat's conversation ends there
    # What the template writes before every response after asking for it, if it has control tokens: a response contains
    # none, so rlchat asks for it with them.
    opening: str

    def apart(self, form: ChatFormat, render: Render, messages: Sequence[Message], opening: bool) -> tuple[str, str]:
        """The texts of the template and of ``form``; equal if the table is exact."""
        try:
            theirs = render(messages, opening) + (self.opening if opening else "")
        except Exception as error:  # whatever the template and Jinja raise
            theirs = f"the error {error}"
        ours = form.text(messages, opening)
        return theirs, ours + self.end if messages[-1].role == "assistant" and not opening else ours


def _renderer(template: str, tokens: Mapping[str, str]) -> Render:
    """transformers' sandboxed environment for templates, without its tokenizers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: Sequence[Message], opening: bool) -> str:
        rows = [{"role": message.role, "content": message.text} for message in messages]
        options: dict[str, Any] = dict(tokens)
        texts = render_jinja_template([rows], chat_template=template, add_generation_prompt=opening, **options)[0]
        return str(texts[0])

    return render


def _parts(render: Render, *roles: Role) -> list[str]:
    """What the template writes around the messages of a conversation of these ``roles``."""
    marks = [f"zq{number}qz" for number in range(len(roles))]
    try:
        written = render([Message(role, mark) for role, mark in zip(roles, marks, strict=True)], False)
    except Exception as error:  # raise_exception() of a template: "System role not supported", and errors of Jinja
        raise NotExact(f"its chat template refuses a conversation of {' '.join(roles)} ({error})") from error
    parts = re.split("|".join(marks), written)
    if len(parts) != len(roles) + 1 or re.findall(r"zq\dqz", written) != marks:
        raise NotExact(f"its chat template repeats, moves or leaves out messages of {' '.join(roles)}")
    return parts


def _without(text: str, end: str, where: str) -> str:
    if not text.endswith(end):
        raise NotExact(f"its chat template writes {text!r} {where}, which does not end in {end!r}")
    return text.removesuffix(end)


def _after(text: str, start: str, where: str) -> str:
    if not text.startswith(start):
        raise NotExact(f"its chat template writes {text!r} {where}, expected it to begin with {start!r}")
    return text.removeprefix(start)


def _table(render: Render, special: Mapping[str, int], single_turn: bool) -> tuple[ChatFormat, _Beyond]:
    """The table without name and trimming; with ``single_turn`` it is read off conversations with one response."""
    first_user, after_user = _parts(render, "user")
    _, user_assistant, last = _parts(render, "user", "assistant")
    before_assistant = _after(user_assistant, after_user, "between a prompt and a response")
    asked = render([Message("user", "zq0qz")], True)
    opening = asked.removeprefix(f"{first_user}zq0qz{after_user}")
    if opening == asked or not before_assistant.startswith(opening):
        raise NotExact(
            f"its chat template asks for a response by {opening!r} and writes one after {before_assistant!r}"
        )
    ends = [token for token in special if last.startswith(token)]
    if not ends:
        raise NotExact(f"its chat template writes {last!r} after a response, expected a special token")
    end, header = max(ends, key=len), before_assistant.removeprefix(opening)
    beyond = _Beyond(last.removeprefix(end), header if any(token in header for token in special) else "")
    if single_turn:
        before_user, after_assistant = _before_single_user(render, first_user, after_user), last
    else:
        _, _, assistant_user, _ = _parts(render, "user", "assistant", "user")
        rest = _after(assistant_user, end, "between a response and a prompt")
        before_user = rest.removeprefix(beyond.end)
        if not rest.startswith(beyond.end) or not first_user.endswith(before_user):
            before_user = _common_end(rest, first_user)
        after_assistant = end + rest.removesuffix(before_user)
    form = ChatFormat(
        name="",
        start=first_user.removesuffix(before_user),
        start_system="",
        before={"user": before_user, "assistant": before_assistant},
        after={"user": after_user, "assistant": after_assistant},
        opening=opening + beyond.opening,
        end=end,
        pad="",
        late_system=False,
        single_turn=single_turn,
    )
    return _with_system(form, render), beyond


def _before_single_user(render: Render, first_user: str, after_user: str) -> str:
    """What comes before a prompt, apart from what comes before a whole conversation."""
    try:
        _, between, _ = _parts(render, "user", "user")
        return _common_end(_after(between, after_user, "between two prompts"), first_user)
    except NotExact:  # prompt and response have to alternate
        return first_user


def _common_end(one: str, other: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    return "".join(letter for letter, _ in same)[::-1]


def _with_system(form: ChatFormat, render: Render) -> ChatFormat:
    """``form`` with the system message, if the template has one (Gemma's has none)."""
    try:
        first, system_user, _ = _parts(render, "system", "user")
        after = _without(system_user, form.before["user"], "after a system message")
    except NotExact:
        return form
    start, late = "", False
    if not form.single_turn:
        try:
            glue = form.after["assistant"]
            later = _parts(render, "user", "assistant", "system", "user")[2].removeprefix(glue)
            if first.endswith(later):
                start, first, late = first.removesuffix(later), later, True
        except NotExact:
            pass
    form = replace(form, before={**form.before, "system": first}, after={**form.after, "system": after})
    form = replace(form, start_system=start, late_system=late)
    empty = [Message("system", ""), Message("user", "zq")]
    skips = form.text(empty, False) != render(empty, False) == render(empty[1:], False)
    return replace(form, skips_empty_system=skips)


def _trimmed(form: ChatFormat, beyond: _Beyond, render: Render) -> ChatFormat:
    """``form`` with what the template removes from the texts of each role, if it is one of the known ways."""
    chains: dict[str, tuple[Role, ...]] = {"system": ("system", "user"), "user": ("user",)}
    for role in get_args(Role):
        if role not in form.before:
            continue
        texts = (*_EDGES, *_THOUGHTS) if role == "assistant" else _EDGES
        talks = [
            [Message(one, text if one == role else "zq") for one in chains.get(role, ("user", "assistant"))]
            for text in texts
        ]
        for way in _ways(form, role):
            if all(len({*beyond.apart(way, render, talk, False)}) == 1 for talk in talks):
                form = way
                break
    return form


def _ways(form: ChatFormat, role: Role) -> Iterator[ChatFormat]:
    """``form`` with every known way to trim texts of ``role``, the plainest first."""
    yield form
    yield replace(form, strips=(*form.strips, role))
    for start in ("", "\n", _WHITE):
        for end in ("", "\n", _WHITE):
            starts = {**form.strip_start, role: start} if start else form.strip_start
            ends = {**form.strip_end, role: end} if end else form.strip_end
            yield replace(form, strip_start=starts, strip_end=ends)
    prefix = form.before["assistant"].removeprefix(form.opening)
    if role == "assistant" and len(prefix.split()) == 2 and not form.thoughts:
        yield from _ways(replace(form, thoughts=True), role)


def _first_difference(form: ChatFormat, beyond: _Beyond, render: Render) -> str:
    """The first conversation that the template writes differently, and both texts; empty if there is none."""
    for messages in _conversations(form):
        for opening in (False, True) if messages[-1].role == "user" else (False,):
            theirs, ours = beyond.apart(form, render, messages, opening)
            if theirs != ours:
                said = ", ".join(f"{message.role} {message.text!r}" for message in messages)
                same = [one == other for one, other in zip(theirs, ours, strict=False)]
                place = same.index(False) if False in same else len(same)
                theirs, ours = theirs[place : place + 40], ours[place : place + 40]
                return f"on ({said}) it writes {theirs!r} where the table has {ours!r}"
    return ""


def _conversations(form: ChatFormat) -> Iterator[list[Message]]:
    draw = random.Random(0)
    starts: list[list[Role]] = [[], ["system"]] if "system" in form.before else [[]]
    texts = _TEXTS
    for length in range(1, 3 if form.single_turn else _LONGEST + 1):
        for start in starts:
            roles: list[Role] = [*start, *(("user", "assistant")[number % 2] for number in range(length))]
            for _ in range(4):
                yield [Message(role, draw.choice(texts)) for role in roles]
    for text in (*texts, *_EDGES, *_THOUGHTS):
        yield [Message("user", text), Message("assistant", text)]
        if not form.single_turn:
            yield [Message("user", text), Message("assistant", _THOUGHT), Message("user", text)]
    if form.late_system:
        yield [Message("user", "a"), Message("assistant", "b"), Message("system", "c"), Message("user", "d")]
