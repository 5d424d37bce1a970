"""Write any noise law to a scheduler_config.json of our own, and read it back.

For laws and predictions that no scheduler of diffusers has (scores of a VP law, the posterior mean, EDM's law with
another prediction ...). The file names a class that diffusers has not, so diffusers refuses it instead of drawing
something else. What enters and leaves: a law, and the dict of such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ldm_pipe.pretrained import FrozenConfig, LdmPipeError
from ldm_pipe.schedule.discrete import Law, NoiseSchedule
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow, ResolutionShift

CLASS_NAME = "LdmPipeScheduler"
_WHERE = "scheduler_config.json"
_LAWS = (NoiseSchedule, ContinuousVP, VE, EDM, Flow)


def write(law: Law) -> dict[str, Any]:
    """Return the dict of a file that `read` turns into the same law."""
    kind = type(law)
    if not isinstance(law, _LAWS):
        raise LdmPipeError(f"the law {kind.__name__}", _WHERE, f"known: {', '.join(known.__name__ for known in _LAWS)}")
    values = {field.name: getattr(law, field.name) for field in fields(law) if field.init and field.name != "config"}
    if isinstance(law, Flow) and law.resolution is not None:
        values["resolution"] = asdict(law.resolution)
    return {"_class_name": CLASS_NAME, "law": kind.__name__, **values}


def read(config: Mapping[str, Any]) -> Law:
    """Read the dict of a file that `write` wrote.

    Raises: LdmPipeError for an unknown law or field, or a value that the law refuses.
    """
    kind = next((known for known in _LAWS if known.__name__ == config.get("law")), None)
    if kind is None:
        known = ", ".join(known.__name__ for known in _LAWS)
        raise LdmPipeError(f"the law is {config.get('law')!r:.80}", _WHERE, f"known: {known}")
    names = {field.name for field in fields(kind) if field.init and field.name != "config"}
    values: dict[str, Any] = {name: value for name, value in config.items() if name not in ("law", "_class_name")}
    if values.keys() - names:
        unknown = sorted(values.keys() - names)
        raise LdmPipeError(f"the law {kind.__name__} has no {unknown}", _WHERE, "a newer version may have written it")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        if values.get("resolution") is not None:
            values["resolution"] = ResolutionShift(**values["resolution"])
        return kind(**values, config=FrozenConfig(config))
    except (TypeError, ValueError) as error:
        if isinstance(error, LdmPipeError):
            raise
        raise LdmPipeError(f"the law {kind.__name__} cannot be built: {error}", _WHERE) from error
