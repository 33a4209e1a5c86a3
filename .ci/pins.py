"""Prints the pip options that pin the dependencies: `-c constraints.txt` on Python 3.11, nothing on other versions.

The pins are resolved and tested on Python 3.11. Elsewhere pip resolves the version ranges in pyproject.toml.
"""

import sys

PINNED = (3, 11)

if __name__ == "__main__":
    if sys.version_info[:2] == PINNED:
        print("-c constraints.txt")
    else:
        pinned, here = (".".join(map(str, version[:2])) for version in (PINNED, sys.version_info))
        print(
            f"constraints.txt is for Python {pinned}; on Python {here} pip uses the version ranges in pyproject.toml",
            file=sys.stderr,
        )
