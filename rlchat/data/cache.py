"""Tokenized corpora on disk. The name of each folder is a hash of everything that its content depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import rlchat
from rlchat.data.corpus import Corpus, DataNeeds, corpus_of
from rlchat.data.file_hashes import hashes_of
from rlchat.data.sources import DataFile
from rlchat.errors import UserError
from rlchat.utils.arrays import read_arrays
from rlchat.utils.cache_folder import mark_used, prune, remove
from rlchat.utils.files import user_cache

_log = logging.getLogger("rlchat")

# The code that determines the content of a corpus: how rows are read, selected, rendered and stored. Paths are relative
# to the package.
_CODE = ("conversation.py", "data", "data/readers", "tokenizer", "utils/arrays.py")


class CorpusCache:
    """Corpora on disk. ``folder`` is by default ``rlchat`` in the user's cache folder."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else user_cache()

    def key(self, files: Sequence[DataFile], needs: DataNeeds, options: dict[str, Any]) -> str:
        """A hash of the bytes of ``files``, the encoding, the lengths, the reading ``options`` and the code that reads.

        The code is included so that a new or changed reader never uses a corpus that an older one produced. A file that
        has not changed since an earlier start is not read for this.

        Raises:
            UserError: a file cannot be read.
        """
        digest = hashlib.sha256()
        lengths = (needs.task, needs.max_length, needs.max_new_tokens, needs.whole_conversations, needs.unpaired)
        digest.update(json.dumps([code_hash(), needs.tokenizer.fingerprint, lengths, sorted(options.items())]).encode())
        for content in hashes_of(files, self.folder):
            digest.update(content)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """The folder of the corpus of ``key``, whether it exists or not."""
        return self.folder / key

    def read(self, key: str) -> Corpus | None:
        """The corpus of ``key``; None if there is none or (with a warning) if its folder is damaged."""
        path = self.path(key)
        if not path.is_dir():
            return None
        try:
            corpus = corpus_of(*read_arrays(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("the tokenized data in %s is damaged (%s); tokenizing again", path, error)
            return None
        mark_used(path)
        return corpus

    def create(self, key: str, write: Callable[[Path, Path], object]) -> Corpus:
        """The corpus that ``write`` writes, which is kept under ``key`` from now on.

        ``write`` gets an empty folder, for arrays, and the path of a temporary file. The least recently used is removed
        from a cache that has become too large. If the cache cannot be written, there is only a warning, and ``write``
        gets a folder for temporary files, because a run works without the cache.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A run that is killed leaves this folder; `rlchat cache` knows it by its name.
            with tempfile.TemporaryDirectory(prefix=f".{key}.", dir=self.folder) as workplace:
                arrays = _written(Path(workplace), write)
                _keep(arrays, self.path(key))
            corpus = corpus_of(*read_arrays(self.path(key)))
        except OSError as error:
            _log.warning("could not cache the tokenized data in %s: %s", self.folder, error.strerror or error)
            # What is mapped stays readable after its file is deleted; where it cannot be deleted, it is left.
            with tempfile.TemporaryDirectory(prefix="rlchat-", ignore_cleanup_errors=True) as workplace:
                return corpus_of(*read_arrays(_written(Path(workplace), write)))
        try:
            prune(self.folder)
        except UserError as error:
            _log.warning("%s", error)
        return corpus


def _written(workplace: Path, write: Callable[[Path, Path], object]) -> Path:
    arrays = workplace / "arrays"
    arrays.mkdir()
    write(arrays, workplace / "trees")
    return arrays


def _keep(arrays: Path, path: Path) -> None:
    """Moves ``arrays`` to ``path``, in place of what is there."""
    try:
        arrays.rename(path)
    except OSError:  # there is another folder, damaged or just written by another process
        remove(path)
        arrays.rename(path)


@cache
def code_hash() -> str:
    """A hash of the source code of all modules that determine the content of a corpus."""
    package = Path(rlchat.__file__).parent
    digest = hashlib.sha256()
    for place in _CODE:
        modules = sorted((package / place).glob("*.py")) if (package / place).is_dir() else [package / place]
        for module in modules:
            digest.update(f"{place}/{module.name}\0".encode() + module.read_bytes() + b"\0")
    return digest.hexdigest()
