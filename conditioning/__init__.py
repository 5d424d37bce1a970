"""Anything -> Condition: the encoders of what a picture should be."""

from __future__ import annotations

from conditioning.clip import CLIPTextEncoder
from conditioning.condition import Condition, TextEncoder
from conditioning.image import CLIPImageEncoder
from conditioning.label import LabelEncoder, LabelInput
from conditioning.load import AnyTextEncoder, load_text_encoder
from conditioning.openclip import OpenCLIPTextEncoder
from conditioning.sizes import score_condition, size_condition
from conditioning.spatial import SpatialInput, SpatialRescaler
from conditioning.t5 import T5TextEncoder
from conditioning.text import Reading
from conditioning.tokenizer import ClipTokenizer
from conditioning.transformer import TransformerTextEncoder
from conditioning.weighted import encode_weighted

__all__ = [
    "AnyTextEncoder",
    "CLIPImageEncoder",
    "CLIPTextEncoder",
    "ClipTokenizer",
    "Condition",
    "LabelEncoder",
    "LabelInput",
    "OpenCLIPTextEncoder",
    "Reading",
    "SpatialInput",
    "SpatialRescaler",
    "T5TextEncoder",
    "TextEncoder",
    "TransformerTextEncoder",
    "encode_weighted",
    "load_text_encoder",
    "score_condition",
    "size_condition",
]
