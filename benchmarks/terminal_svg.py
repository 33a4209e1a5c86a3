"""The screens of a terminal as an animated SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape

_CHAR, _LINE, _MARGIN = 8.4, 19, 14  # in pixels

COLORS = {
    "default": "#d8dee9",
    "black": "#7b8794",
    "brightblack": "#7b8794",
    "red": "#e06c75",
    "green": "#98c379",
    "brown": "#e5c07b",
    "blue": "#61afef",
    "magenta": "#c678dd",
    "cyan": "#56b6c2",
    "white": "#d8dee9",
}
"""The colors by their names in pyte. A style is one of these names, with ``b`` before it for bold, or ``cursor``."""

Run = tuple[int, str, str]
"""First column, text, style."""
Row = tuple[Run, ...]
Frames = list[tuple[float, tuple[Row, ...]]]


def animated_svg(frames: Frames, end: float, columns: int, title: str) -> str:
    """The animated SVG: each row of the screen is shown as long as it stays the same. It has no scripts.

    Without animation, as in a print, it shows the last frame.

    Args:
        frames: what the screen shows, and from when on, in seconds.
        end: when the animation begins again, in seconds.
        columns: the width of the screen.
        title: for those who do not see it.
    """
    rows_of = len(frames[0][1])
    shown: dict[tuple[int, Row], list[tuple[float, float]]] = defaultdict(list)
    for number in range(rows_of):
        since, row = 0.0, frames[0][1][number]
        for when, rows in frames[1:]:
            if rows[number] != row:
                shown[number, row].append((since, when))
                since, row = when, rows[number]
        shown[number, row].append((since, end))
    rules: dict[str, str] = {}
    body = []
    for (number, row), times in shown.items():
        if not row:
            continue
        steps = "".join(_steps(times, end))
        name = rules.setdefault(steps, f"k{len(rules)}")
        is_last = times[-1][1] == end
        body.append(f'<g class="{"f" if is_last else "f h"}" style="animation-name:{name}">{_row(number, row)}</g>')
    width, height = columns * _CHAR + 2 * _MARGIN, rows_of * _LINE + 2 * _MARGIN
    colors = "".join(
        f".{name}{{fill:{color}}}.b{name}{{fill:{color};font-weight:bold}}" for name, color in COLORS.items()
    )
    frames_of = "".join(f"@keyframes {name}{{{steps}}}" for steps, name in rules.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}">'
        f"<title>{escape(title)}</title>"
        "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}"
        f"{colors}.f{{animation:{end:.2f}s step-end infinite}}.h{{visibility:hidden}}"
        f"@media (prefers-reduced-motion:reduce){{.f{{animation:none}}}}{frames_of}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#20242c"/>{"".join(body)}</svg>\n'
    )


def _steps(times: Sequence[tuple[float, float]], end: float) -> Iterator[str]:
    """The keyframes of a row that is visible at ``times``."""
    if times[0][0] > 0:
        yield "0%{visibility:hidden}"
    for since, until in times:
        yield f"{100 * since / end:.2f}%{{visibility:visible}}"
        yield f"{100 * until / end:.2f}%{{visibility:{'visible' if until == end else 'hidden'}}}"


def _row(number: int, row: Row) -> str:
    y = _MARGIN + number * _LINE
    parts = []
    for column, text, style in row:
        x = f"{_MARGIN + column * _CHAR:.1f}"
        if style == "cursor":
            parts.append(f'<rect x="{x}" y="{y}" width="{_CHAR}" height="{_LINE - 2}" fill="#d8dee9"/>')
        if text.strip():
            length = f' textLength="{len(text) * _CHAR:.1f}"' if len(text) > 1 else ""
            fill = ' fill="#20242c"' if style == "cursor" else f' class="{style}"'
            parts.append(f'<text x="{x}" y="{y + 14}"{length}{fill}>{escape(text)}</text>')
    return "".join(parts)
