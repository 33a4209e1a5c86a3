"""The settings of the user, from the command line and from configuration files, as plain values with their places."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from rlchat.cli.recipes import FOLDER
from rlchat.errors import UserError

_log = logging.getLogger("rlchat")


@dataclass(frozen=True)
class Setting:
    """One value that the user set."""

    place: str
    """As the user wrote it: ``--model.clip_eps`` on the command line, ``model.clip_eps`` in a file."""
    keys: tuple[str, ...]
    """The path to the value, without ``init_args``."""
    value: Any
    """The value as parsed by YAML."""
    is_missing: bool = False
    """Whether it is a flag without a value. The value None, written ``null``, is a value."""


def config_files(words: Sequence[str]) -> list[str]:
    """The files that ``--config`` names in ``words``, the command line without the command."""
    return [value for flag, value in _flags(words) if flag == "--config" and value is not None]


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(flag, value) for each flag of the command line; a positional word has the value None."""
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if equals or not flag.startswith("--"):
            yield flag, value if equals else None
        elif rest and not rest[0].startswith("--"):
            yield flag, rest.pop(0)
        else:
            yield flag, None


def settings_of_flags(words: Sequence[str]) -> Iterator[Setting | UserError]:
    """The setting of each flag except ``--config``; an error in place of a word that is no flag."""
    appended: dict[tuple[str, ...], Any] = {}  # the class that --trainer.callbacks+=CLASS has appended to a list
    for flag, text in _flags(words):
        if flag == "--config" or flag.endswith((".help", "--help", "--print_config")):
            continue
        if not flag.startswith("-"):
            yield UserError(f"{flag!r} is not an option; options are written --group.name VALUE")
            continue
        keys = tuple(key for key in flag.lstrip("-").rstrip("+").split(".") if key != "init_args")
        value = text if text is None else _from_yaml(text)
        if flag.endswith("+"):
            appended[keys] = value
        elif keys[:-1] in appended and value is not None:  # an option of that class
            one = {"class_path": appended[keys[:-1]], "init_args": {keys[-1]: value}}
            yield Setting("--" + ".".join(keys), keys[:-1], [one])
            continue
        value = [value] if flag.endswith("+") and value is not None else value
        yield Setting("--" + ".".join(keys), keys, value, is_missing=not text)


def with_home(value: Any) -> Any:
    """``value`` with the home folder for ``~`` in every text in it that begins with ``~/``, at any depth.

    A :class:`jsonargparse.Namespace` is changed in place. Only paths begin so.
    """
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if isinstance(value, Namespace):
        for name, inner in vars(value).items():
            setattr(value, name, with_home(inner))
        return value
    if isinstance(value, dict):
        return {name: with_home(inner) for name, inner in value.items()}
    return [with_home(inner) for inner in value] if isinstance(value, list) else value


def _from_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def settings_of_file(path: str) -> Iterator[Setting]:
    """The settings in the configuration file ``path``; those of the model are one setting."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for group, value in content.items():
        if isinstance(value, dict) and group != "model" and "class_path" not in value:
            yield from (Setting(f"{group}.{name}", (group, name), inner) for name, inner in value.items())
        else:
            yield Setting(group, (group,), value)


def class_path_of(setting: Setting) -> Any:
    """The class path of the model in ``setting``, or None if it contains none."""
    value = setting.value
    if setting.keys == ("model", "class_path"):
        return value
    if setting.keys == ("model",):
        return value.get("class_path") if isinstance(value, dict) else value
    return None


def with_own_tokenizer(words: Sequence[str]) -> list[str]:
    """``words`` such that a pretrained base model of the user keeps its own tokenizer under a recipe.

    A recipe for a model from scratch also sets the encoding of that model. It is not the user's choice, so it is reset
    where the user sets another base model and no encoding. ``words`` contain the paths of the recipes.
    """
    base: Any = None
    encoding = None  # of the recipe; None if the user sets one
    for file in config_files(words):
        model = yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("model")
        options = model.get("init_args") or model if isinstance(model, dict) else {}
        from_scratch = Path(file).is_relative_to(FOLDER) and isinstance(options.get("base_model"), dict)
        base = options.get("base_model", base)
        if "tiktoken_encoding" in options:
            encoding = options["tiktoken_encoding"] if from_scratch else None
    for setting in settings_of_flags(words[1:]):
        if isinstance(setting, Setting) and setting.keys == ("model", "base_model"):
            base = setting.value
        elif isinstance(setting, Setting) and setting.keys == ("model", "tiktoken_encoding"):
            encoding = None
    if encoding is None or not isinstance(base, str):
        return list(words)
    _log.info(
        "%s keeps its own tokenizer, because %s is the recipe's encoding for a model from scratch; to use it, pass "
        "--model.tiktoken_encoding %s",
        base,
        encoding,
        encoding,
    )
    return [*words, "--model.tiktoken_encoding=null"]
