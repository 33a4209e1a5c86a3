"""The versions of a model that `rlchat learn` has made of it: their files, numbers and figures.

The versions of ``chat.pt`` are in the folder ``chat.versions`` beside it: ``1.pt``, ``2.pt``, …, each with its figures
in ``1.json``, ``2.json``, …. ``rejected.jsonl`` has the figures of those that were not accepted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rlchat.errors import UserError
from rlchat.utils.files import append_lines, write_atomically

_NUMBER = re.compile(r"(\d+)\.(?:pt|json)")


class Versions:
    """The versions of the model file ``model``.

    Args:
        model: the original model file.
        out: a file (``.pt``) for the next version, or a folder for all of them, instead of the folder beside ``model``.

    Raises:
        UserError: ``out`` exists and is not a folder. No version replaces another file.
    """

    def __init__(self, model: str | Path, out: str | Path | None = None) -> None:
        self.model = Path(model)
        self.folder = self.model.with_name(f"{self.model.stem}.versions")
        self._file: Path | None = None
        if out is not None and Path(out).suffix == ".pt":
            self._file = Path(out)
            for path in (self._file, *(self._file.with_suffix(end) for end in (".json", ".reward.pt"))):
                if path.exists():
                    raise UserError(f"--out {out}: {path} exists, and no version replaces a file; choose another path")
        elif out is not None:
            self.folder = Path(out)
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"--out {out}: expected a folder, or a new file that ends in .pt")

    def numbers(self) -> list[int]:
        """The numbers of the versions whose files exist, in ascending order."""
        return sorted(int(path.stem) for path in self._numbered() if path.suffix == ".pt")

    def next_number(self) -> int:
        """One more than the highest number so far, also of a version whose files were deleted, if a chat knows it."""
        return 1 + max([self._remembered(), *(int(path.stem) for path in self._numbered())])

    def path(self, number: int) -> Path:
        """The model file of version ``number``."""
        return self.folder / f"{number}.pt"

    def owns(self, model_name: str) -> bool:
        """Whether responses of ``model_name`` are responses of this model: the name of its file, or of a version's."""
        return model_name in ("", self.model.name) or number_of(model_name) is not None

    def accept(
        self, write: Callable[[Path], object], figures: dict[str, Any], above: int = 0
    ) -> tuple[int | None, Path]:
        """Writes the next version with ``write(path)`` and its figures; returns its number, over ``above``, and path.

        A version in a file of another name, ``out``, has no number. ``write`` must write atomically. The figures are
        written first, so that a version without figures cannot be.

        Raises:
            UserError: a file cannot be written; then there is no new version.
        """
        path = self._file or self.path(max(self.next_number(), above + 1))
        number = int(path.stem) if path.stem.isdecimal() else None
        record = path.with_suffix(".json")
        figures = {"version": number, "path": str(path), **figures}
        text = json.dumps(figures, ensure_ascii=False, indent=1) + "\n"
        write_atomically(record, lambda file: file.write(text.encode()))
        try:
            write(path)
        except BaseException:
            record.unlink(missing_ok=True)
            raise
        return number, path

    def reject(self, figures: dict[str, Any]) -> Path:
        """Adds the figures of a version that was not accepted to ``rejected.jsonl``; returns the path of this file."""
        path = self.folder / "rejected.jsonl"
        if self._file is not None:
            path = self._file.with_name(f"{self._file.stem}.rejected.jsonl")
        append_lines(path, [figures])
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process makes versions here. Windows has no such lock; there, it does nothing.

        Raises:
            UserError: another process makes versions now, or the folder cannot be written.
        """
        folder = self.folder if self._file is None else self._file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("ab")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; set another place with --out") from error
        with lock:
            _lock(lock, folder)
            yield

    def _remembered(self) -> int:
        """The highest number that a chat which learns has seen. It remembers it also if the folder is deleted."""
        try:
            highest = json.loads((self.folder / "state.json").read_bytes())["highest"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return highest if type(highest) is int else 0

    def _numbered(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _NUMBER.fullmatch(path.name)]


def number_of(model_name: str) -> int | None:
    """The number of the version whose model file is called ``model_name``; None for another name."""
    found = re.fullmatch(r"(\d{1,9})\.pt", model_name, re.ASCII)
    return None if found is None else int(found[1])


def _lock(file: IO[bytes], folder: Path) -> None:
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another `rlchat learn` is at work here; wait until it has ended") from None
