"""Tokenized corpora on disk. The name of each file is a hash of everything that its content depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import rlchat
from rlchat.data.corpus import Corpus, DataNeeds, Prompts, Ragged, RankedReplies, Sequences, StoredConversations
from rlchat.data.sources import DataFile, cannot_read
from rlchat.errors import UserError
from rlchat.utils.cache_folder import mark_used, prune
from rlchat.utils.files import user_cache, write_atomically

_log = logging.getLogger("rlchat")

# The code that determines the content of a corpus: how rows are read, selected, rendered and stored. Paths are relative
# to the package.
_CODE = ("conversation.py", "data", "data/readers", "tokenizer")


class CorpusCache:
    """Corpora on disk. ``folder`` is by default ``rlchat`` in the user's cache folder."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else user_cache()

    def path(self, key: str) -> Path:
        """The file for the corpus of ``key``, whether it exists or not."""
        return self.folder / f"{key}.pt"

    def read(self, key: str) -> Corpus | None:
        """The corpus of ``key``; None if there is none or (with a warning) if the file is damaged."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            # torch.load does not detect changed bytes; the archive's checksums do.
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"bad checksum of {broken}")
            mark_used(path)
            return _corpus_from_state(torch.load(path, weights_only=True))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as e:
            _log.warning("the tokenized data in %s is damaged (%s); tokenizing again", path, e)
            return None

    def write(self, key: str, corpus: Corpus) -> None:
        """Stores ``corpus``, and removes the least recently used of a folder that has become too large.

        Only warns if the folder cannot be written, because a run works without the cache.
        """
        try:
            write_atomically(self.path(key), lambda file: torch.save(_corpus_to_state(corpus), file))
            prune(self.folder)
        except UserError as error:
            _log.warning("could not cache the tokenized data: %s", error)


def cache_key(files: Sequence[DataFile], needs: DataNeeds, options: dict[str, Any]) -> str:
    """A hash of the bytes of ``files``, the encoding, the lengths, the reading ``options`` and the code that reads.

    The code is included so that a new or changed reader never uses a corpus that an older one produced.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    lengths = (needs.task, needs.max_length, needs.max_new_tokens, needs.whole_conversations)
    digest.update(json.dumps([code_hash(), needs.tokenizer.fingerprint, lengths, sorted(options.items())]).encode())
    for file in files:
        digest.update(_hash_of_file(file))
    return digest.hexdigest()


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


def _hash_of_file(file: DataFile) -> bytes:
    digest = hashlib.sha256()
    try:
        with file.path.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise UserError(f"no such data file: {file}; pass a file with --data.path FILE") from None
    except (OSError, ValueError) as error:
        raise cannot_read(file, error) from None
    return digest.digest()


def _corpus_to_state(corpus: Corpus) -> dict[str, Any]:
    conversations = corpus.prompts.conversations
    assert isinstance(conversations, StoredConversations)
    return {
        **{name: getattr(corpus, name) for name in ("tree_ids", "split_ids", "facts", "report", "warnings")},
        "sequences": {
            "ids": _ragged_to_state(corpus.sequences.ids),
            "loss_mask": _ragged_to_state(corpus.sequences.loss_mask),
            "tree": corpus.sequences.tree,
        },
        "ranked": {**vars(corpus.ranked), "ids": _ragged_to_state(corpus.ranked.ids)},
        "prompts": {
            "ids": _ragged_to_state(corpus.prompts.ids),
            "rows": _ragged_to_state(conversations.rows),
            "messages": _ragged_to_state(conversations.messages),
            "parents": conversations.parents,
            "tree": corpus.prompts.tree,
        },
    }


def _corpus_from_state(state: dict[str, Any]) -> Corpus:
    sequences, ranked, prompts = state["sequences"], state["ranked"], state["prompts"]
    stored = StoredConversations(Ragged(*prompts["rows"]), Ragged(*prompts["messages"]), prompts["parents"])
    return Corpus(
        **{name: state[name] for name in ("tree_ids", "split_ids", "facts", "report", "warnings")},
        sequences=Sequences(Ragged(*sequences["ids"]), Ragged(*sequences["loss_mask"]), sequences["tree"]),
        ranked=RankedReplies(**{**ranked, "ids": Ragged(*ranked["ids"])}),
        prompts=Prompts(Ragged(*prompts["ids"]), stored, prompts["tree"]),
    )


def _ragged_to_state(rows: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.flat, rows.offsets
