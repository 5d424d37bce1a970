"""LoRA and textual inversion files of every form, as layers and words.

It may import the networks and text encoders. It does not know pipelines: these merge what is read here.
"""
