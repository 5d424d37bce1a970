"""Anything -> Condition: the encoders of what a picture should be."""

from __future__ import annotations

from conditioning.clip import CLIPTextEncoder
from conditioning.condition import Condition, TextEncoder
from conditioning.tokenizer import ClipTokenizer

__all__ = ["CLIPTextEncoder", "ClipTokenizer", "Condition", "TextEncoder"]
