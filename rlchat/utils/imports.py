"""Lazy imports, and faster imports of large packages."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level ``__getattr__`` (PEP 562) that imports a name of ``package`` when it is first used.

    ``homes`` maps each public name to the module that defines it. So ``from rlchat import ChatInterface`` does not
    import Lightning.

    Raises (from the returned function):
        AttributeError: for a name that ``homes`` does not list.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with no_garbage_collection():
            value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switches the garbage collector off during large imports.

    They create a million objects that live until the end of the program. The collector would scan these objects
    repeatedly, which takes a fifth of the time of importing torch and transformers. The
    objects are frozen afterwards, so that they are not scanned at exit either.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def install_command(extra: str) -> str:
    """The command that installs the packages of the optional extra: from the clone in a clone, else by name."""
    clone = Path(__file__).parents[2]
    if (clone / "pyproject.toml").is_file():
        return f"{shlex.quote(sys.executable)} -m pip install -e {shlex.quote(f'{clone}[{extra}]')}"
    required = [requirement.partition(";") for requirement in metadata.requires("rlchat") or []]
    names = [name.strip() for name, _, marker in required if f"extra == '{extra}'" in marker.replace('"', "'")]
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.join(names)}"
