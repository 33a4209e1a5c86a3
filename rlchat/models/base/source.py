"""Where a base model comes from, as far as its files say: for the model card, which names no path of a machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

_FILE = "rlchat_source.json"  # in the folder that a GGUF file is unpacked into
_HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
_HUB_URL = re.compile(r"https://huggingface\.co/(\w[\w.-]*/\w[\w.-]*)/?")
# Of a GGUF file: the model itself, or the one that its weights were quantized from.
_GGUF_HUB = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")
_GGUF_BASE = "general.base_model.0.repo_url"


@dataclass(frozen=True)
class BaseSource:
    """What is known of a base model. Empty values are unknown.

    Attributes:
        hub: its name in the model hub.
        title: what its files call it.
        license: the licence in its files.
    """

    hub: str = ""
    title: str = ""
    license: str = ""

    @classmethod
    def of(cls, base_model: str) -> BaseSource:
        """The source of ``base_model``, a folder or a name in the model hub.

        The hub name of a folder is that in its path, for the cache of the hub, or ``_name_or_path`` of its
        ``config.json`` if that ends in the folder's name: other values may be paths, or name an ancestor of the model.
        """
        folder = Path(base_model)
        if not folder.is_dir():
            return cls(base_model if _HUB_NAME.fullmatch(base_model) else "")
        if (folder / _FILE).is_file():
            return cls.from_values(_object(folder / _FILE)) or cls()
        names = [
            part.removeprefix("models--").replace("--", "/") for part in folder.parts if part.startswith("models--")
        ]
        written = str(_object(folder / "config.json").get("_name_or_path"))
        if _HUB_NAME.fullmatch(written) and written.rpartition("/")[2].lower() == folder.resolve().name.lower():
            names.append(written)
        return cls(next(iter(names), ""), "", _license(folder / "README.md"))

    @classmethod
    def of_gguf(cls, value: Callable[[str], Any]) -> BaseSource:
        """The source of a GGUF file whose metadata ``value`` returns by name; None for what it lacks."""
        for name in (*_GGUF_HUB, _GGUF_BASE):
            found = str(value(name) or "")
            if (url := _HUB_URL.fullmatch(found)) or (name == _GGUF_HUB[0] and _HUB_NAME.fullmatch(found)):
                hub = url[1] if url else found
                break
        else:
            hub = ""
        title = " ".join(str(value("general.name") or value("general.basename") or "").split())
        license_id = str(value("general.license") or "")
        return cls(hub, title, license_id if re.fullmatch(r"[\w.+-]+", license_id) else "")

    @classmethod
    def from_values(cls, values: Any) -> BaseSource | None:
        """The inverse of :meth:`values`; None if ``values`` are anything else."""
        if not isinstance(values, dict) or values.keys() != {field.name for field in fields(cls)}:
            return None
        if not all(isinstance(value, str) and value.isprintable() for value in values.values()):
            return None
        return cls(**values)

    def values(self) -> dict[str, str]:
        """Plain values, for the configuration in a model file."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Writes the source into ``folder``, where :meth:`of` finds it."""
        (folder / _FILE).write_text(json.dumps(self.values()), encoding="utf-8")


def _license(card: Path) -> str:
    """The licence in the metadata of a model card; empty if there is none."""
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, ValueError):
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
