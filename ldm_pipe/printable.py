"""Text from elsewhere, made fit for a terminal or a line of a report: it cannot steer, hide or forge anything there.

Enters: any text, such as the prompt in a foreign picture or the name of a file. Leaves: the same without control
characters. This file imports nothing but the standard library.
"""

from __future__ import annotations

import re
import unicodedata

# Escape sequences whole, so that their letters do not stay behind: CSI (colours, cursor), OSC and its kin (title,
# links, clipboard; up to BEL, ST or the end), and two-character ones. ECMA-48, 5.3 to 5.6.
_ESCAPES = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]?"
    "|(?:\x1b[\\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c|$)"
    "|\x1b[ -/]*[0-~]?"
)
# Marks that turn the direction of what follows: a name or prompt could show other letters than it holds.
_TURNS = dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF])


def printable(text: str, *, lines: bool = False) -> str:
    r"""Take control characters, escape sequences and marks of direction out of a text.

    Args:
        lines: keep line breaks; else they become spaces, so that one value cannot look like several.
    Returns: text that any UTF-8 stream takes; half characters (names that are no UTF-8) are shown as `\udc80`.
    """
    text = _ESCAPES.sub("", text).translate(_TURNS)
    kept = []
    for char in text.replace("\r\n", "\n"):
        if char in "\n\r\t\v\f\x85\u2028\u2029":
            kept.append("\n" if lines and char != "\t" else " ")
        elif "\ud800" <= char <= "\udfff":
            kept.append(f"\\u{ord(char):04x}")
        elif unicodedata.category(char) != "Cc":
            kept.append(char)
    return "".join(kept)
