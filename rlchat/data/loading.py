"""Loads the tokenized data of a set of files: from the cache, or from the files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rlchat.data.cache import CorpusCache
from rlchat.data.corpus import Corpus, DataNeeds
from rlchat.data.formats import read_forest
from rlchat.data.sources import DataFile
from rlchat.data.tokenizing import Tokenization, tokenize_trees

_log = logging.getLogger("rlchat")

# Below this size of the trees, in bytes, several processes take longer to start than they save.
_ENOUGH_FOR_PROCESSES = 10_000_000
_MOST_PROCESSES = 16


@dataclass(frozen=True)
class Reading:
    """The options of :func:`rlchat.data.formats.read_forest`."""

    lang: str | None
    on_bad_line: Literal["error", "skip"]
    keep_synthetic: bool
    split_text: bool


def corpus_key(cache: CorpusCache, files: Sequence[DataFile], reading: Reading, how: Tokenization) -> str:
    """The key of the corpus in ``cache``. Raises :class:`UserError` if a file cannot be read."""
    options = {**vars(reading), **asdict(how.imitation), "contrast": how.contrast}
    return cache.key(files, how.needs, options)


def load_corpus(
    cache: CorpusCache, key: str, files: Sequence[DataFile], reading: Reading, how: Tokenization, *, first: bool
) -> Corpus:
    """The corpus of ``key`` from ``cache``, or made from ``files``. Progress and summary are shown by ``first`` only.

    Raises:
        UserError: a file or a row of it is invalid, or its text cannot be tokenized.
    """
    began = time.monotonic()

    def write(arrays: Path, trees: Path) -> None:
        forest, report = read_forest(files, trees, progress=first, **vars(reading))
        processes = _processes(trees.stat().st_size) if first else 0
        summary, warnings = report.summary(), report.warning_lines()
        tokenize_trees(forest, how, arrays, summary, warnings, processes=processes, progress=first)

    source = "read from the cache"
    corpus = cache.read(key)
    if corpus is None:
        corpus = cache.create(key, write)
        source = f"tokenized in {time.monotonic() - began:.1f} s"
    if first:
        _log.info("data: %s; %s; %s", corpus.report, _losses(corpus, how.needs), source)
        for warning in corpus.warnings:
            _log.warning("data: %s", warning)
    return corpus


def _processes(size: int) -> int:
    """How many processes tokenize trees of ``size`` bytes; 0 for this one only."""
    # What this process may use: a container or `taskset` may allow fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_PROCESSES) if cores > 1 and size >= _ENOUGH_FOR_PROCESSES else 0


def _losses(corpus: Corpus, needs: DataNeeds) -> str:
    """How many rows were truncated or left out, as a clause."""
    dropped, cut, closed, left_out = (corpus.facts[name] for name in ("dropped", "cut", "response_cut", "left_out"))
    text = f"to fit {needs.max_length:,} tokens"
    if needs.max_new_tokens:
        text += f" ({needs.max_new_tokens:,} of them reserved for the response)"
    text += f", oldest messages dropped from {dropped:,} rows and text cut from {cut:,}"
    if needs.task in ("reward", "dpo"):
        text += f" ({closed:,} of {len(corpus.ranked.rank):,} responses cut and closed with the end marker)"
    return text + (f"; {left_out:,} threads with nothing to learn left out" if left_out else "")
