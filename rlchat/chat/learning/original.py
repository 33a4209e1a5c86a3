"""The model file that versions are made of, as it was when the chat began."""

from __future__ import annotations

from pathlib import Path

from rlchat.chat.versions import number_of
from rlchat.errors import UserError

Stamp = tuple[int, int, int]


class Original:
    """The original model in the file ``path``, which another program may replace at any time.

    Attributes:
        path: the model file.
        model_id: its :func:`rlchat.models.model_file.identity` when this object was made.
        is_version: whether it is a version of another model itself, under a new name.

    Raises:
        UserError: the file is missing, damaged, or no chat model.
    """

    def __init__(self, path: Path) -> None:
        from rlchat.models.model_file import stored_identity  # imports torch

        self.path = path
        self._stamp = stamp_of(path)
        self.model_id, self._weights = stored_identity(path)
        self.is_version = not self._weights.startswith(self.model_id)

    def check(self) -> None:
        """Raises :class:`UserError` if the file has other weights now, or cannot be read. A copy of it is no change."""
        from rlchat.models.model_file import stored_identity

        stamp = stamp_of(self.path)
        if stamp is None or stamp != self._stamp:
            # The weights are read, not mapped: to map a file that is being written may end this process.
            _, weights = stored_identity(self.path, weights=True)
            if weights != self._weights:
                raise UserError(f"{self.path} was replaced since the start; restart to use it")
            self._stamp = stamp


def stamp_of(path: Path) -> Stamp | None:
    """Changes when the file ``path`` does; None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def version_at(path: Path) -> tuple[int, Path] | None:
    """The number of the version in the file ``path`` and the path of its original model, from where the file is.

    None if it is not in a folder of versions, or if there is no original beside the folder.
    """
    number, folder = number_of(path.name), path.parent if path.parent.name else path.absolute().parent
    original = folder.with_suffix(".pt")
    if number is None or folder.suffix != ".versions" or not original.exists():
        return None
    return number, original
