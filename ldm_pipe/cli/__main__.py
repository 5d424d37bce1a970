"""`python -m ldm_pipe.cli`: the command without its entry point."""

import sys

from ldm_pipe.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
