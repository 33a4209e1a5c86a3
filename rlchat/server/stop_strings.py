"""Cut a streamed text at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes on the text of one response, piece by piece, up to the first complete stop string.

    Text that may be the start of a stop string is held back until the next piece decides. For example, with the stop
    string ``END``, the pieces ``aE`` and ``Nb`` come out as ``a`` and ``ENb``.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can be passed on after ``piece``; empty once a stop string was ``found``."""
        text = self._held + piece
        if (places := [place for string in self._strings if (place := text.find(string)) >= 0]) or self.found:
            self.found, self._held = True, ""
            return text[: min(places, default=0)]
        begun = (n for string in self._strings for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n]))
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text that was held back, at the end of the response."""
        held, self._held = self._held, ""
        return held
