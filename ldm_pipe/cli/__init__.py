"""The command `ldm-pipe`: its options, and what each subcommand does.

It may import everything, but inside functions: `--help` costs no torch. Nothing imports it.
"""

from ldm_pipe.cli.command import main

__all__ = ["main"]
