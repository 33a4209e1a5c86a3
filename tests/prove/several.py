"""Several command lines of rlchat in a row, in the same processes, which takes the time of one start.

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
