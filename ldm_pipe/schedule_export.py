"""Write diffusers' scheduler_config.json."""

from ldm_pipe.schedule_config import write

__all__ = ["write"]
