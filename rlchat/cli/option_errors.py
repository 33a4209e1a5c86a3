"""What the parser says of an option, as one sentence that names the cure.

jsonargparse tells everything that it tried, over twenty lines and more. Here that is read again for what went wrong:
which option, of which class, and what would have been right.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence

from rlchat.errors import UserError

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "collections.abc.Sequence": "a list",
    "NoneType": "null",
}
_FEW = 12
_SHOWN = 80


def explain(message: str, words: Sequence[str], options: Iterable[str]) -> UserError:
    """``message`` of jsonargparse about the command line ``words`` in a sentence; ``options`` are those that exist."""
    # The innermost of what was tried is what the user meant: the key that it names, and the class that took it.
    keys = re.findall(r'Parser key "([^"]+)"', message)
    place = _as_written(".".join(keys), words)
    classes = re.findall(r"Problem with given class_path '([^']+)'", message)
    inner = message.rpartition('Parser key "')[2]

    if found := re.search(r"unrecognized arguments: (\S+)", message):
        return _no_such(found[1].partition("=")[0], options)
    if found := re.search(r"does not accept option '([^']+)'", message):
        return _no_such(f"--{found[1]}", options)
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        flag = _as_written(".".join([*keys, found[1]]), words)
        return _not_of_class(flag, found[1], classes[-1] if classes else place)
    if found := re.search(r"argument (--[^/:\s]+)[^:]*: expected one argument", message):
        return UserError(f"{found[1]} needs a value; give it as {found[1]} VALUE")
    if "arguments are required" in message and "model" in message:
        return UserError("nothing says which model; name a recipe or a file with --config, such as --config demo/ppo")
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", inner):
        return UserError(f"{place}: {found[1]} is no {found[2]}; name a class that is derived from {found[2]}")
    if classes and (found := re.search(rf"class_path '{re.escape(classes[-1])}':\s+(.+)", inner)):
        return _no_class(place, classes[-1], found[1])
    if found := re.search(r"Expected a dot import path string: (\S+)", inner):
        return UserError(f"{place}: {found[1]} is no class; give its import path, such as rlchat.rewards.TooShort")
    if found := re.search(r"Expected an? (.+)\. Got value: (.*)", inner):
        return _wrong_type(place, [found[1]], found[2])
    if expected := re.findall(r"- Expected an? (.+)", inner.partition("Given value")[0]):
        value = re.search(r"Given value: (.*)", inner)
        return _wrong_type(place, expected, value[1] if value else "")
    return UserError(_one_line(message, 300))


def _as_written(key: str, words: Sequence[str]) -> str:
    """``key`` as a flag where the command line has it, and else as the configuration does."""
    flags = {word.partition("=")[0].rstrip("+").replace(".init_args", "") for word in words}
    return f"--{key}" if f"--{key}" in flags else key


def _no_such(flag: str, options: Iterable[str]) -> UserError:
    if not flag.startswith("-"):
        return UserError(f"{flag!r} belongs to no option; options are written --group.name VALUE")
    known = sorted(set(options))
    name = flag.rpartition(".")[2].lstrip("-")
    elsewhere = [option for option in known if option.rpartition(".")[2].lstrip("-") == name]
    near = elsewhere or difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    return UserError(f"{flag}: no such option; {_cure(near)}")


def _not_of_class(flag: str, name: str, class_path: str) -> UserError:
    parameters = _parameters(class_path)
    near = difflib.get_close_matches(name, parameters, n=1)
    owner = class_path.rpartition(".")[2]
    if not near and 0 < len(parameters) <= _FEW:
        return UserError(f"{flag}: no such option of {owner}; it has {', '.join(parameters)}")
    return UserError(f"{flag}: no such option of {owner}; {_cure(near)}")


def _no_class(place: str, class_path: str, reason: str) -> UserError:
    module, _, name = class_path.rpartition(".")
    if reason.startswith("No module named"):
        missing = reason.removeprefix("No module named ").strip("'\"")
        return UserError(
            f"{place}: {class_path} cannot be imported, there is no module {missing}; put its file into the folder in "
            f"which you run rlchat, or install it"
        )
    if "has no attribute" in reason:
        near = difflib.get_close_matches(name, dir(importlib.import_module(module)), n=1)
        cure = f"did you mean {module}.{near[0]}?" if near else "give the import path of a class"
        return UserError(f"{place}: {module} has no {name}; {cure}")
    return UserError(f"{place}: {class_path}: {_one_line(reason, 200)}")


def _wrong_type(place: str, expected: Sequence[str], value: str) -> UserError:
    choices = [choice for name in expected if name.startswith("typing.Literal") for choice in _choices(name)]
    wanted = list(dict.fromkeys(filter(None, map(_in_words, expected))))
    if choices:
        wanted.append("one of " + ", ".join(dict.fromkeys(choices)))
    if len(wanted) > 1 and "null" in wanted:  # what it may be when nobody sets it is no cure
        wanted.remove("null")
    return UserError(f"{place}: {_one_line(value, _SHOWN)} will not do; give {' or '.join(wanted)}")


def _in_words(type_name: str) -> str:
    """What a type's name in Python means to somebody who writes a configuration; nothing where there are no words."""
    if type_name.startswith("typing.Literal"):
        return ""
    plain = re.sub(r"<class '([^']+)'>", r"\1", type_name)
    return _TYPES.get(plain, "" if "path" in plain else plain)


def _choices(literal: str) -> list[str]:
    return [choice.strip("'") for choice in literal.removeprefix("typing.Literal[").rstrip("]").split(", ")]


def _cure(near: Sequence[str]) -> str:
    return f"did you mean {' or '.join(near)}?" if near else "--print_config after the rest shows all that there are"


def _parameters(class_path: str) -> list[str]:
    """The options of a class, and of those that it hands its options on to; none where it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    names: dict[str, None] = {}
    try:
        for cls in getattr(importlib.import_module(module), name).__mro__:
            if "__init__" in vars(cls):
                parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
                names |= {p.name: None for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
                if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                    break
    except (ImportError, AttributeError, ValueError):
        return []
    return list(names)


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
