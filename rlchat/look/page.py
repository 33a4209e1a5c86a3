"""The page: from the template, with a policy that allows only its own scripts and styles, and the data if wanted."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources

_PLACE = "<!-- data -->"
_POLICY = "<!-- policy -->"


def build_page(names: Sequence[str], chunks: Sequence[str] | None = None) -> str:
    """The page over the runs ``names``.

    Args:
        names: one or two runs.
        chunks: the data of each run, for a page that is a file; None: the page asks its server for them.
    """
    template = resources.files("rlchat.look").joinpath("page.html").read_text(encoding="utf-8")
    setup = json.dumps({"runs": list(names), "live": chunks is None})
    blocks = [_block("setup", setup), *(_block(f"run-{number}", chunk) for number, chunk in enumerate(chunks or ()))]
    policy = html.escape(content_security_policy(template))
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return template.replace(_POLICY, meta, 1).replace(_PLACE, "\n".join(blocks), 1)


def content_security_policy(page: str) -> str:
    """Allows the scripts and styles that are in ``page``, and requests to its own server."""

    def hashes(tag: str) -> str:
        digests = (hashlib.sha256(inner.encode()).digest() for inner in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'"
    )


def _block(name: str, text: str) -> str:
    """A data block. ``<`` is escaped, so that no text in it can end the block; in JSON it occurs in strings only."""
    escaped = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{escaped}</script>'
