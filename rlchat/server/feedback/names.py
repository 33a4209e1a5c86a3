"""Sentences for clients, which must not learn the folders of the server's machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath


class FileNames:
    """Puts names of files in place of their paths.

    Args:
        files: the files that a sentence may name.
        folders: folders whose files it may name.
    """

    def __init__(self, files: Iterable[PurePath], folders: Iterable[PurePath] = ()) -> None:
        names: dict[str, str] = {}
        for folder in folders:
            for text in _forms(folder):
                names |= {f"{text}/": "", f"{text}\\": "", text: folder.name}
        for file in files:
            names |= dict.fromkeys(_forms(file), file.name)
        # The longest first: a path may begin with another one.
        forms = sorted((text for text in names if _has_folder(text)), key=len, reverse=True)
        self._names = names
        self._known = re.compile("|".join(map(re.escape, forms)) or r"(?!)")

    def public(self, sentence: str, instead: str) -> str:
        """``sentence`` with names in place of the paths that are known; ``instead`` if it has another path.

        A slash or a backslash is taken for a path: the end of an unknown path cannot be found, because it may contain
        spaces.
        """
        named = self._known.sub(lambda match: self._names[match[0]], sentence)
        return instead if _has_folder(named) else named


def _forms(path: PurePath) -> set[str]:
    """How ``path`` may be written in a sentence."""
    paths = {path, path.absolute(), path.resolve()} if isinstance(path, Path) else {path}
    return {text for one in paths for text in (str(one), one.as_posix())}


def _has_folder(text: str) -> bool:
    return "/" in text or "\\" in text
