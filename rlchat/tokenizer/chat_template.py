"""From a Jinja chat template to a :class:`ChatFormat`: read once, and proven equal, or refused with an example.

The template writes conversations whose messages are marks that occur nowhere else; what it writes between the marks is
the table. Then conversations with difficult texts have to come out of the table as they come out of the template.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
_THOUGHTS = "<think>\nA thought.\n</think>\n\nAn answer."
_LONGEST = 7  # messages of a conversation that is compared


def read_template(template: str, special: Mapping[str, int], tokens: Mapping[str, str], name: str) -> ChatFormat:
    """The chat format that ``template`` writes.

    ``special`` are the special tokens of the tokenizer, ``tokens`` the values of ``bos_token``, ``eos_token`` and
    others that the template may use. Raises :class:`NotExact` naming a conversation on which template and table differ.
    """
    render = _renderer(template, tokens)
    form = _strips(_table(render, special, name, template), render)
    if not (wrong := _first_difference(form, render)):
        return form
    single = _single_turn(form, render)
    if single is None or _first_difference(single, render):
        raise NotExact(f"its chat template depends on more than the role of a message: {wrong}")
    return single


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


def _table(render: Render, special: Mapping[str, int], name: str, template: str) -> ChatFormat:
    first_user, after_user = _parts(render, "user")
    _, user_assistant, after_assistant = _parts(render, "user", "assistant")
    before_assistant = _after(user_assistant, after_user, "between a prompt and a response")
    _, _, assistant_user, _ = _parts(render, "user", "assistant", "user")
    before_user = _after(assistant_user, after_assistant, "between a response and a prompt")
    asked = render([Message("user", "zq0qz")], True)
    opening = asked.removeprefix(f"{first_user}zq0qz{after_user}")
    if opening == asked or not before_assistant.startswith(opening):
        raise NotExact(
            f"its chat template asks for a response by {opening!r} and writes one after {before_assistant!r}"
        )
    ends = [token for token in special if after_assistant.startswith(token)]
    if not ends:
        raise NotExact(f"its chat template writes {after_assistant!r} after a response, expected a special token")
    end = max(ends, key=len)
    form = ChatFormat(
        name=name,
        start=_without(first_user, before_user, "before the first message"),
        start_system="",
        before={"user": before_user, "assistant": before_assistant},
        after={"user": after_user, "assistant": after_assistant},
        opening=opening,
        end=end,
        pad="",
        late_system=False,
        template=template,
    )
    return _with_system(form, render)


def _with_system(form: ChatFormat, render: Render) -> ChatFormat:
    """``form`` with the system message, if the template has one (Gemma's has none)."""
    try:
        first, system_user, _ = _parts(render, "system", "user")
        after = _without(system_user, form.before["user"], "after a system message")
    except NotExact:
        return form
    start, late = "", False
    try:
        glue = form.after["assistant"]
        later = _parts(render, "user", "assistant", "system", "user")[2].removeprefix(glue)
        if first.endswith(later):
            start, first, late = first.removesuffix(later), later, True
    except NotExact:
        pass
    form = replace(form, before={**form.before, "system": first}, after={**form.after, "system": after})
    return replace(form, start_system=start, late_system=late)


def _strips(form: ChatFormat, render: Render) -> ChatFormat:
    """``form`` with the roles whose text the template strips of white space."""
    strips: list[str] = []
    for role in get_args(Role):
        if role not in form.before:
            continue
        roles: dict[str, tuple[Role, ...]] = {"system": ("system", "user"), "user": ("user",)}
        chain = roles.get(role, ("user", "assistant"))
        messages = [Message(one, " zq " if one == role else "zq") for one in chain]
        stripped = replace(form, strips=(role,))
        if render(messages, False) == stripped.text(messages, False) != form.text(messages, False):
            strips.append(role)
    return replace(form, strips=tuple(strips))


def _single_turn(form: ChatFormat, render: Render) -> ChatFormat | None:
    """``form`` for conversations of one response, with what the template writes before a last response."""
    if not form.opening:
        return None
    asked, written = (
        render([Message("user", "zq")], True),
        render([Message("user", "zq"), Message("assistant", "xj")], False),
    )
    if not written.startswith(asked):
        return None
    before = written[len(asked) :].split("xj")[0]
    return replace(
        form, before={**form.before, "assistant": form.opening + before}, single_turn=True, late_system=False
    )


def _first_difference(form: ChatFormat, render: Render) -> str:
    """The first conversation that the template writes differently, and both texts; empty if there is none."""
    for messages in _conversations(form):
        for opening in (False, True) if messages[-1].role == "user" else (False,):
            try:
                theirs = render(messages, opening)
            except Exception as error:  # whatever the template and Jinja raise
                theirs = f"the error {error}"
            if theirs != (ours := form.text(messages, opening)):
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
    for text in texts:
        yield [Message("user", text), Message("assistant", text)]
        if not form.single_turn:
            yield [Message("user", text), Message("assistant", _THOUGHTS), Message("user", text)]
    if form.single_turn:
        yield [Message("user", "Hello"), Message("assistant", _THOUGHTS)]
    elif form.late_system:
        yield [Message("user", "a"), Message("assistant", "b"), Message("system", "c"), Message("user", "d")]
