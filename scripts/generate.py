"""Draw pictures from prompts: the same as `ldm-pipe generate`.

python scripts/generate.py "red apple" --seed 7 -n 4 -o out.png --grid
"""

from __future__ import annotations

import sys

from ldm_pipe.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
