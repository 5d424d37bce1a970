"""What each `ldm-pipe` command does; imported when the command runs, so that `ldm-pipe --help` stays quick."""
