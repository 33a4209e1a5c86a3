"""Text that ends where one of some strings begins."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets the text of one reply through, piece by piece, up to the first of ``strings`` that is complete in it.

    What may be the beginning of one is held back until the next piece shows what it is.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that became certain with ``piece``; nothing more once a string was ``found``."""
        text = self._held + piece
        if (places := [place for string in self._strings if (place := text.find(string)) >= 0]) or self.found:
            self.found, self._held = True, ""
            return text[: min(places, default=0)]
        begun = (n for string in self._strings for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n]))
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and turned out to be text."""
        held, self._held = self._held, ""
        return held
