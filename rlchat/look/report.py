"""`rlchat report`: one HTML page, and a picture for a slide, about a run.

rlchat report
rlchat report lightning_logs/ppo/version_3 --out report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rlchat.errors import UserError
from rlchat.runs.report import LOGS, find_run, read_report
from rlchat.utils.files import set_aside, write_atomically


def main(args: list[str]) -> int:
    """Runs ``rlchat report`` with ``args``; returns the exit code. Raises :class:`UserError`."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    out = options.out
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"invalid value {str(out)!r} for --out: expected a file name that ends in .html")
    for path in (out, out.with_suffix(".png")):
        if path.exists() and not options.force:
            raise UserError(f"{path} already exists; set another --out, or use --force")
    page, picture = write_page(find_run(options.run), out)
    print(f"report: {page}\npicture for a slide: {picture}")
    return 0


def write_page(run: Path, out: Path, keep_older: bool = False) -> tuple[Path, Path]:
    """Writes the page ``out`` about the run in the folder ``run``, and a picture beside it; returns both paths.

    ``keep_older`` renames the page and the picture of an earlier run, instead of replacing them.
    """
    from rlchat.look.report_page import draw_slide, report_page  # Matplotlib takes a second

    report, picture = read_report(run), out.with_suffix(".png")
    for path in (out, picture) if keep_older else ():
        if path.exists():
            set_aside(path)
    write_atomically(out, lambda file: file.write(report_page(report).encode()))
    write_atomically(picture, lambda file: draw_slide(report).savefig(file, format="png", dpi=150))
    return out, picture


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat report",
        description="Write one HTML page about a run, and a picture for a slide: what was trained on what, figures "
        "before and after with confidence intervals over prompts, plots, good and bad samples, alarms, versions, and "
        "the command that repeats the run.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN",
        help=f"folder of a run, such as {LOGS}/ppo/version_0 (default: the newest training run under {LOGS})",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the page and the picture if they exist")
    return parser
