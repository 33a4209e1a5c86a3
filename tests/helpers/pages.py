"""The chat page in a headless browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from helpers.servers import Server

SECONDS = 20_000.0  # milliseconds; this machine may be busy


def opened(browser: Any, server: Server, **options: Any) -> Iterator[Any]:
    """The page of ``server`` in a new browser context; it must not log an error or violate its own policy."""
    from playwright.sync_api import expect

    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    context.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    context.close()
    assert troubles == []
