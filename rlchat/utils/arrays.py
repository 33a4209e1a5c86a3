"""Arrays on disk: each is a file to which parts are appended, and which is then mapped into memory.

A folder holds one ``NAME.bin`` for each array, its values in the machine's byte order, and ``about.json`` with their
types, lengths and checksums. Mapped arrays take memory only where they are read, and processes share it.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[Any]]

_ABOUT = "about.json"
_TYPES = {
    name: getattr(torch, name) for name in ("bool", "uint8", "int32", "int64", "float32", "float64")
}  # numpy's names are the same


@dataclass
class _Growing:
    """The file of an array, and what was written to it."""

    file: IO[bytes]
    dtype: str
    length: int = 0
    checksum: int = 0


class ArrayWriter:
    """Appends to arrays in ``folder``, which must exist. The folder is complete after :meth:`finish`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._growing: dict[str, _Growing] = {}

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for growing in self._growing.values():
            growing.file.close()

    def length(self, name: str) -> int:
        """The number of values appended to ``name`` so far."""
        return self._growing[name].length if name in self._growing else 0

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Appends ``values`` [n] to the array ``name``. Raises OSError if the disk is full."""
        if name not in self._growing:
            self._growing[name] = _Growing((self.folder / f"{name}.bin").open("wb"), str(values.dtype))
        growing = self._growing[name]
        assert str(values.dtype) == growing.dtype in _TYPES
        content = values.tobytes()
        growing.file.write(content)
        growing.length += len(values)
        growing.checksum = zlib.crc32(content, growing.checksum)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Writes everything to the disk, with ``facts``, which :func:`read_arrays` returns (plain values)."""
        for growing in self._growing.values():
            _to_disk(growing.file)
        about = {
            "byte order": sys.byteorder,
            "arrays": {name: [array.dtype, array.length, array.checksum] for name, array in self._growing.items()},
            "facts": facts,
        }
        content = json.dumps(about).encode()
        with (self.folder / _ABOUT).open("wb") as file:
            file.write(b"%d\n%b" % (zlib.crc32(content), content))
            _to_disk(file)


def read_arrays(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays in ``folder`` by name, mapped into memory, and the facts that were stored with them.

    Raises:
        ValueError: something in the folder is not what was written; the message says what.
        OSError: a file cannot be read.
    """
    checksum, _, content = (folder / _ABOUT).read_bytes().partition(b"\n")
    if not checksum.isdigit() or int(checksum) != zlib.crc32(content):
        raise ValueError(f"bad checksum of {_ABOUT}")
    about = json.loads(content)
    if about["byte order"] != sys.byteorder:
        raise ValueError("it was written by a machine with another byte order")
    arrays = {}
    for name, (dtype, length, expected) in about["arrays"].items():
        path = folder / f"{name}.bin"
        # A mapped file must not be shorter than its array: the process would be killed where it reads beyond the end.
        if path.stat().st_size != length * _TYPES[dtype].itemsize or _checksum(path) != expected:
            raise ValueError(f"bad checksum of {path.name}")
        arrays[name] = _mapped(path, length, _TYPES[dtype])
    return arrays, about["facts"]


def _mapped(path: Path, length: int, dtype: torch.dtype) -> Tensor:
    if not length:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=length, dtype=dtype)


def _checksum(path: Path) -> int:
    checksum = 0
    # Read, not mapped: pages that are mapped would count as memory of this process.
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
