"""Captions for training: one drawing has a name and keywords, and users type either.

What enters: a name, its keywords, a source of randomness. What leaves: one caption. Pure; knows no files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

NAME_ALONE, NAME_AND_KEYWORDS = 0.5, 0.3  # the rest: keywords alone
MAX_EXTRA_KEYWORDS, MAX_KEYWORDS_ALONE = 3, 4
WORD_DROPOUT = 0.05


def mix_caption(name: str, keywords: Sequence[str], rng: random.Random) -> str:
    """Draw a caption: the name alone (one half), the name and up to three keywords, or up to four keywords alone.

    Keywords are shuffled and repeat nothing of the name; each word is dropped with probability 0.05, never all of them.
    Without keywords the caption is the name.

    Args:
        rng: makes every choice, so the caption is a function of its seed.
    """
    kind = rng.random()
    # in the order given: that of a set differs between processes, and with it the captions of a resumed run
    distinct = dict.fromkeys(str(word) for word in keywords if str(word) != name)
    others = sorted(distinct, key=lambda _: rng.random())
    if not others or kind < NAME_ALONE:
        parts = [name]
    elif kind < NAME_ALONE + NAME_AND_KEYWORDS:
        parts = [name, *others[: rng.randint(1, MAX_EXTRA_KEYWORDS)]]
    else:
        parts = others[: rng.randint(1, MAX_KEYWORDS_ALONE)]
    caption = ", ".join(parts)
    words = caption.split(" ")
    kept = [word for word in words if rng.random() >= WORD_DROPOUT]
    return " ".join(kept).strip(",") or caption
