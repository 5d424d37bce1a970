"""Turn an original single file or an ADM checkpoint into a folder, or a folder into a single file: `ldm-pipe convert`.

python scripts/import_checkpoint.py v1-5-pruned-emaonly.safetensors sd15
python scripts/import_checkpoint.py v2-1_768-ema-pruned.ckpt sd21 --prediction v
python scripts/import_checkpoint.py 64x64_diffusion.pt adm64
python scripts/import_checkpoint.py sd15 sd15.safetensors --dtype float16
"""

from __future__ import annotations

import sys

from ldm_pipe.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
