"""Turn a model folder or a training run into a diffusers folder and compare the pictures: the same as `ldm-pipe
export`.

python scripts/export_diffusers.py runs/emoji/diffusion exported/emoji
"""

from __future__ import annotations

import sys

from ldm_pipe.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
