"""The animated SVG of a terminal: which row is visible when, also without animation."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from benchmarks.terminal_svg import Frames, animated_svg

NAME = "{http://www.w3.org/2000/svg}"
FRAMES: Frames = [
    (0.0, (((0, "you>", "bcyan"), (5, " ", "cursor")), ())),
    (1.0, (((0, "you>", "bcyan"), (5, "<a>", "default")), ((2, "&", "red"),))),
    (3.0, (((0, "you>", "bcyan"), (5, " ", "cursor")), ((2, "&", "red"),))),
]


def test_rows_are_visible_while_the_screen_shows_them() -> None:
    text = animated_svg(FRAMES, 4.0, 20, "a < b")
    root = ElementTree.fromstring(text)
    assert root.findtext(f"{NAME}title") == "a < b"
    assert "<script" not in text
    steps = dict(re.findall(r"@keyframes (k\d+)\{(.*?\})\}", text))
    shown = {}
    for group in root.findall(f"{NAME}g"):
        words = "".join(one.text or "" for one in group.findall(f"{NAME}text"))
        name = group.attrib["style"].removeprefix("animation-name:")
        shown[words] = (group.attrib["class"], re.sub(r"visibility:(.).*?\}", r"\1}", steps[name]))
    assert shown == {
        "you>": ("f", "0.00%{v}25.00%{h}75.00%{v}100.00%{v}"),
        "you><a>": ("f h", "0%{h}25.00%{v}75.00%{h}"),
        "&": ("f", "0%{h}25.00%{v}100.00%{v}"),
    }
    assert ".h{visibility:hidden}" in text
    assert len(root.findall(f".//{NAME}g/{NAME}rect")) == 1
