"""Runs several command lines of rlchat one after the other in the same processes, to start them only once.

python -m prove.several '[["fit", …], ["fit", …]]'
"""

from __future__ import annotations

import json
import sys

from rlchat.__main__ import main

if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        code = main(words)
        if code:
            sys.exit(code)
