"""Figures of matplotlib: opened without a screen, closed as PNG. The library is imported only here, when it is used."""

from __future__ import annotations

import io
from typing import Any


def subplots(*args: Any, **options: Any) -> Any:
    """Return matplotlib's `pyplot.subplots`, drawn to files only.

    Raises: ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*args, **options)


def figure_png(figure: Any, **options: Any) -> bytes:
    """Close a figure and return its PNG, the same bytes for the same picture: no version is written into it.

    Args:
        options: of matplotlib's `savefig`, such as dpi.
    """
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, **options)
    pyplot.close(figure)
    return buffer.getvalue()
