"""Which hosts a server on the user's machine answers to."""

from __future__ import annotations

import ipaddress
from collections.abc import Container
from urllib.parse import urlsplit


def is_address_or(host: str, names: Container[str]) -> bool:
    """Whether the Host header ``host``, with or without a port, is an IP address or one of ``names`` (lower case)."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name in names:
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
