"""Read single fields of a U-Net config: lists, numbers, and the error that names a field and its value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm_pipe.pretrained import LdmPipeError

MOST_LAYERS = 64  # of levels, of blocks in a level, of layers in a block: 10 is the most of any known network


def refuse(field: str, value: Any, allowed: str) -> LdmPipeError:
    """Return the error for a value that the network cannot represent."""
    return LdmPipeError(f"{field} = {value!r:.200} cannot be represented", "U-Net config", f"Allowed: {allowed}.")


def check_types(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse fields whose value is of another type than their default; None and lists are checked later."""
    for field, default in defaults.items():
        value = config[field]
        if default is None or value is None or isinstance(value, (list, tuple)):
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            if not is_number:
                raise refuse(field, value, "a number")
        elif not isinstance(default, (list, tuple)) and not isinstance(value, type(default)):
            raise refuse(field, value, {bool: "true or false", str: "a word"}.get(type(default), "another type"))


def per_level(config: Mapping[str, Any], field: str, count: int) -> list[Any]:
    """Spread a single value over all levels; a list must have one entry per level."""
    value = config[field]
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise refuse(field, value, f"one value, or a list of {count} as block_out_channels has")
    return list(value)


def positive(config: Mapping[str, Any], field: str, most: float = math.inf) -> int:
    """Return a field that must be a whole number of at least 1."""
    return all_positive(field, [config[field]], most=most)[0]


def all_positive(field: str, values: list[Any], least: int = 1, most: float = math.inf) -> list[int]:
    """Return values that must be whole numbers between two bounds."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            bound = "" if most == math.inf else f" and at most {most}"
            raise refuse(field, value, f"whole numbers of at least {least}{bound}")
    return values


def read_channels(config: Mapping[str, Any]) -> list[int]:
    """Return the widths of the levels; the norms must be able to group them."""
    widths = config["block_out_channels"]
    if not isinstance(widths, (list, tuple)) or not 1 <= len(widths) <= MOST_LAYERS:
        raise refuse("block_out_channels", widths, f"a list of 1 to {MOST_LAYERS} widths")
    groups = positive(config, "norm_num_groups")
    for width in all_positive("block_out_channels", list(widths)):
        if width % groups:
            raise refuse("norm_num_groups", groups, f"divisors of {width} channels")
    return list(widths)


def check_known(config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields whose value is not among the known ones; 1 and True are different values."""
    for field, allowed in known.items():
        if not any(config[field] == value and type(config[field]) is type(value) for value in allowed):
            raise refuse(field, config[field], ", ".join(repr(value) for value in allowed))


def kinds(config: Mapping[str, Any], field: str, known: Mapping[str, Any], count: int) -> list[Any]:
    """Look up the block types of all levels, in the order of the file."""
    names = config[field]
    if not isinstance(names, (list, tuple)) or len(names) != count:
        raise refuse(field, names, f"a list of {count} as block_out_channels has")
    for name in names:
        if name not in known:
            raise refuse(field, name, ", ".join(known))
    return [known[name] for name in names]


def one_or_list(values: list[Any]) -> Any:
    """Write a list whose entries are all equal as that entry."""
    return values[0] if all(value == values[0] for value in values) else values
