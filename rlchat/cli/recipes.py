"""The configurations that come with rlchat, by name: ``demo/ppo`` is ``configs/demo/ppo.yaml``."""

from __future__ import annotations

from pathlib import Path

import yaml

from rlchat.errors import UserError

_PACKAGE = Path(__file__).parents[1]
# An installed wheel contains the recipes in the package, a clone next to it.
FOLDER = next(f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir() or f.parent != _PACKAGE)


def recipes() -> dict[str, Path]:
    """Every shipped recipe: its name and its file."""
    return {str(p.relative_to(FOLDER).with_suffix("")): p for p in sorted(FOLDER.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file for ``--config name``: the file at that path, else the recipe of that name.

    Raises :class:`UserError` if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in recipes():
        return recipes()[name]
    raise UserError(f"no file and no recipe named {name!r}; the recipes are {', '.join(recipes())}")


def checked_recipe(name: str) -> Path:
    """As :func:`find_recipe`. Also raises :class:`UserError` for a file that is not a YAML mapping of options."""
    path = find_recipe(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not YAML: {error.problem}; fix the line") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: has no options; `rlchat fit --config smoke --print_config` shows the format")
    return path


def describe_recipes() -> str:
    """One line per recipe: its name and the first line of its comment."""
    lines = []
    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"  --config {name:<12} {first}")
    return "\n".join(lines)
