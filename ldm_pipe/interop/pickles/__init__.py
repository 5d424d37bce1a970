"""Checkpoints that hold pickles: turned into safetensors by a process of its own, without running their code.

It may import `pretrained`. It does not know what the tensors mean.
"""
