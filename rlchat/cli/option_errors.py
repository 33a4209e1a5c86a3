"""Explains in one sentence why the command line or a configuration file is invalid.

jsonargparse raises an ``ArgumentError`` with up to twenty lines of prose and without fields. This
module does not parse that text. It goes through the settings again, compares each with the signatures of the
classes that take them, and reports the first invalid one: the option, its class, and the valid values.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
from collections import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from rlchat.cli.option_aliases import ALIASES
from rlchat.cli.settings import Setting, class_path_of, config_files, settings_of_file, settings_of_flags
from rlchat.errors import UserError
from rlchat.rewards import Factor

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    abc.Sequence: "a list",
    abc.Iterable: "a list",
    tuple: "a list",
    dict: "a mapping",
    abc.Mapping: "a mapping",
}
_OWN_OPTIMIZER = ("optimizer", "lr_scheduler")  # Lightning's options, where modules leave the choice to the user
_FEW = 12
_SHOWN = 80


def explain(argv: Sequence[str], groups: Mapping[str, type], options: Iterable[str], detail: str) -> UserError:
    """An error for the first invalid setting in ``argv`` (the command and its options).

    Args:
        argv: the command line, with every ``--config`` as the path of an existing file.
        groups: the class that takes the options of a group, such as ``trainer`` or ``data``.
        options: all flags of the command, with those of the classes in ``groups``.
        detail: the parser's message. It is shown if no invalid setting is found.
    """
    known = set(options)
    words = list(argv[1:])
    settings = [setting for path in config_files(words) for setting in settings_of_file(path)]
    model: Any = None
    for setting in settings + list(settings_of_flags(words)):
        if isinstance(setting, UserError):
            return setting
        if setting.keys[0] == "model" and (chosen := class_path_of(setting)) is not None:
            model = chosen
        error = _problem(setting, groups, known, model)
        if error is not None:
            return error
    if model is None:
        return UserError("no model is specified; set --config to a recipe or a file, such as --config demo/sft")
    return UserError(_one_line(detail, 300))


def ignored_variables(
    environment: Mapping[str, str], argv: Sequence[str], options: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """The environment variables that look like options of the command in ``argv`` but have no effect, and why.

    ``PL_FIT__TRAINER__MAX_EPOCHS`` sets ``--trainer.max_epochs`` of ``fit``, unless a file or a flag sets it.
    """
    prefix = f"PL_{argv[0].upper()}__"
    variables = sorted(name for name in environment if name.startswith(prefix))
    if not variables:
        return
    names = {option.lstrip("-").upper().replace(".", "__"): option for option in options}
    words = list(argv[1:])
    set_by_user = [setting for path in config_files(words) for setting in settings_of_file(path)]
    set_by_user += [setting for setting in settings_of_flags(words) if isinstance(setting, Setting)]
    for variable in variables:
        option = names.get(variable.removeprefix(prefix))
        if option is None:
            yield variable, f"{argv[0]} has no option of that name"
        elif any(setting.keys == tuple(option.lstrip("-").split(".")) for setting in set_by_user):
            yield variable, f"a configuration file or a flag sets {option}"


# ---- invalid settings ------------------------------------------------------------------------------------------------


def _problem(setting: Setting, groups: Mapping[str, type], known: set[str], model: Any) -> UserError | None:
    """The problem with ``setting``; None if it is valid."""
    group, flag = setting.keys[0], "--" + ".".join(setting.keys)
    if group == "model" and setting.keys[1:] != ("class_path",):
        if len(setting.keys) == 1:
            # A file may contain only options if another file names the class.
            options_only = isinstance(setting.value, dict) and "class_path" not in setting.value and model is not None
            base = imported_class("model", model, LightningModule) if options_only else LightningModule
            return _class_problem(setting.place, setting.value, base) if isinstance(base, type) else base
        if setting.is_missing:
            return UserError(f"{setting.place}: expected a value: {setting.place} VALUE")
        found = imported_class("model", model, LightningModule)
        if found is None or isinstance(found, UserError):
            return found
        return _option_problem(setting.place, setting.keys[1], _nested(setting), found)
    if group == "seed_everything" and setting.value is not None:
        return _value_problem(setting.place, setting.value, int | bool)
    if group in _OWN_OPTIMIZER:
        return UserError(
            f"{setting.place} is not supported: each stage uses AdamW with its own schedule; set "
            f"--model.learning_rate, schedule, warmup and weight_decay, or override configure_optimizers in a subclass "
            f"of the stage and set --model to it"
        )
    if group == "data" and len(setting.keys) == 1 and setting.value is not None:
        return _class_problem(setting.place, setting.value, LightningDataModule)
    if flag not in known and (
        group not in groups or len(setting.keys) == 1 or setting.keys[1] not in _hints(groups[group])
    ):
        return _no_such_option(flag, known)
    if setting.is_missing:
        return UserError(f"{setting.place}: expected a value: {setting.place} VALUE")
    if group in groups and len(setting.keys) > 1:
        return _option_problem(setting.place, setting.keys[1], _nested(setting), groups[group])
    return None


def _nested(setting: Setting) -> Any:
    """The value of the whole option, if a flag sets a part of it, for example ``--model.reward.factors``."""
    value = setting.value
    for key in reversed(setting.keys[2:]):
        value = {key: value}
    return value


def _option_problem(place: str, name: str, value: Any, owner: type) -> UserError | None:
    """The problem with ``value`` as the option ``name`` of the class ``owner``."""
    hints = _hints(owner)
    if name not in hints:
        return _no_such_option_of_class(place, name, owner)
    members = _members(hints[name])
    if value is None:  # written as null
        return None if {type(None), Any, inspect.Parameter.empty} & {*members} else _wrong_type(place, members, value)
    return _value_problem(place, value, hints[name])


def _value_problem(place: str, value: Any, hint: Any) -> UserError | None:
    members = _members(hint)
    if hint is Any or inspect.Parameter.empty in members or Any in members:
        return None
    for member in members:
        base = _class_of(member)
        # A string is not the path of a class where plain strings are allowed too, such as trainer.accelerator auto.
        if base is not None and (isinstance(value, dict) or (isinstance(value, str) and str not in members)):
            return _class_problem(place, value, base)
        item = next(iter(get_args(member)), None)
        if get_origin(member) in (list, abc.Sequence, abc.Iterable) and isinstance(value, list):
            bad = (error for one in value if (error := _value_problem(place, one, item)) is not None)
            if (error := next(bad, None)) is not None:
                return error
    if any(_class_of(member) or any(map(_class_of, get_args(member))) for member in members) and isinstance(
        value, list
    ):
        return None
    return None if _accepts(hint, value) else _wrong_type(place, members, value)


def _accepts(hint: Any, value: Any) -> bool:
    """Whether jsonargparse accepts ``value`` for an option of the type ``hint``."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    except Exception:  # a type that jsonargparse only supports in signatures
        return True
    return True


def _class_problem(place: str, value: Any, base: type) -> UserError | None:
    """The problem with ``value``, which specifies an instance of ``base`` or of a subclass."""
    if isinstance(value, dict) and "class_path" not in value:
        found: Any = base
        init_args = value
    else:
        class_path = value["class_path"] if isinstance(value, dict) else value
        init_args = (value.get("init_args") if isinstance(value, dict) else None) or {}
        found = imported_class(place, class_path, base)
    if not isinstance(found, type):
        return found
    for name, inner in init_args.items():
        inside = place if place.endswith(f".{name}") else f"{place}.{name}"
        if (error := _option_problem(inside, name, inner, found)) is not None:
            return error
    return None


def imported_class(place: str, class_path: Any, base: type) -> Any:
    """The class at ``class_path``, or an error with the reason why it is not a subclass of ``base``."""
    if not isinstance(class_path, str):
        return None if class_path is None else _wrong_type(place, [str], class_path)
    if "." not in class_path:
        found: Any = next((cls for cls in _derived(base) if cls.__name__ == class_path), None)
        return found or UserError(
            f"{place}: {class_path} is not a known class; specify its import path, such as rlchat.rewards.TooShort"
        )
    module, _, name = class_path.rpartition(".")
    try:
        found = resolve_name(class_path)
    except ModuleNotFoundError as error:
        return UserError(
            f"{place}: {class_path} cannot be imported: there is no module {error.name}; put its file in the folder "
            f"where you run rlchat, or install it"
        )
    except AttributeError:
        near = difflib.get_close_matches(name, dir(importlib.import_module(module)), 1)
        cure = f"did you mean {module}.{near[0]}?" if near else "specify the import path of a class"
        return UserError(f"{place}: {module} has no {name}; {cure}")
    except Exception as error:
        return UserError(f"{place}: {class_path} cannot be imported: {_one_line(str(error), 200)}")
    if not isinstance(found, type) and callable(found):
        cure = f"specify a subclass of {base.__name__}"
        if base is Factor:
            cure = f"set class_path to rlchat.rewards.FunctionReward and its init_args to {{function: {class_path}}}"
        return UserError(f"{place}: {class_path} is a function; {cure}")
    if isinstance(found, type) and not issubclass(found, base):
        return UserError(f"{place}: {class_path} is not a {base.__name__}; specify a subclass of {base.__name__}")
    return found


def _derived(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield from _derived(cls)


# ---- sentences -------------------------------------------------------------------------------------------------------


def _no_such_option(flag: str, known: set[str]) -> UserError:
    name = flag.rpartition(".")[2].lstrip("-")
    same_name = sorted(option for option in known if option.rpartition(".")[2].lstrip("-") == name)
    alias = [f"--{option}" for option in ALIASES.get(name, ()) if f"--{option}" in known]
    near = same_name or alias or difflib.get_close_matches(flag, sorted(known), n=1, cutoff=0.7)
    return UserError(f"{flag}: no such option; {_suggestion(near)}")


def _no_such_option_of_class(place: str, name: str, owner: type) -> UserError:
    parameters = list(_hints(owner))
    prefix = place.removesuffix(name)
    alias = [
        option.replace("model.", prefix) if option.startswith("model.") else f"--{option}"
        for option in ALIASES.get(name, ())
        if not option.startswith("model.") or option.removeprefix("model.") in parameters
    ]
    near = alias[:1] or difflib.get_close_matches(name, parameters, n=1)
    if not near and 0 < len(parameters) <= _FEW:
        return UserError(f"{place}: no such option of {owner.__name__}; it has {', '.join(parameters)}")
    return UserError(f"{place}: no such option of {owner.__name__}; {_suggestion(near)}")


def _suggestion(near: Sequence[str]) -> str:
    return f"did you mean {' or '.join(near)}?" if near else "add --print_config to see all options"


def _wrong_type(place: str, members: Sequence[Any], value: Any) -> UserError:
    expected = list(dict.fromkeys(_NAMES[kind] for m in members if (kind := get_origin(m) or m) in _NAMES))
    choices = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if choices:
        expected.append("one of " + ", ".join(dict.fromkeys(choices)))
    if not expected:
        expected = [getattr(member, "__name__", str(member)) for member in members if member is not type(None)]
    shown = "null" if value is None else _one_line(str(value), _SHOWN)
    return UserError(f"invalid value {shown!r} for {place}: expected {' or '.join(expected)}")


# ---- signatures ------------------------------------------------------------------------------------------------------


def _hints(owner: type) -> dict[str, Any]:
    """The options of a class with their types, and those of the classes to which it passes its ``**kwargs``."""
    found: dict[str, Any] = {}
    for cls in owner.__mro__:
        if "__init__" not in vars(cls):
            continue
        init = vars(cls)["__init__"]
        parameters = list(inspect.signature(init).parameters.values())[1:]
        try:
            hints = get_type_hints(init)
        except NameError:  # a type that only type checkers import
            hints = {}
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                hint = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, hint | None if parameter.default is None else hint)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _members(hint: Any) -> list[Any]:
    """The types that ``hint`` allows, with those of nested unions."""
    if get_origin(hint) in (Union, types.UnionType):
        return [member for part in get_args(hint) for member in _members(part)]
    return [hint]


def _class_of(hint: Any) -> type | None:
    """``hint`` if it is a class whose instances a configuration specifies; None for plain values."""
    plain = (*_NAMES, type(None), object)
    if not isinstance(hint, type) or hint in plain or get_origin(hint) is not None:
        return None
    return None if issubclass(hint, str | int | float | Path) or hint.__module__ == "datetime" else hint


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
