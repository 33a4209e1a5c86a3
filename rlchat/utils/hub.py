"""Whether the model hub answers. Without a network, its client tries each file of a model for 24 seconds."""

from __future__ import annotations

import functools
import time
from pathlib import Path

_SECONDS = 10.0  # to wait for an answer


def hub_error(name: str) -> Exception | None:
    """Why the hub does not give files of the model ``name``; None if it does, or if ``name`` is a folder.

    It is asked once a minute, without another attempt. With the environment variable ``HF_HUB_OFFLINE=1``, it is not
    asked at all.
    """
    return None if Path(name).is_dir() else _answer(name, int(time.monotonic() // 60))


@functools.lru_cache(maxsize=16)  # a run asks for a dozen files of one model
def _answer(name: str, minute: int) -> Exception | None:
    """The error of a request in this ``minute``, so that a failure does not hold for the rest of the process."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # slow to import

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_SECONDS)
    except Exception as error:  # no valid name of a hub, or whatever its client raises for a failed connection
        return error
    return None


def reachable_source(name: str) -> str:
    """What to pass to ``from_pretrained`` for the model ``name``: its folder in the cache if the hub has no answer.

    ``local_files_only`` is not enough: transformers ignores it when it looks for an adapter.
    """
    if hub_error(name) is None:
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):  # nothing is cached, or no valid name of a hub
        return name
