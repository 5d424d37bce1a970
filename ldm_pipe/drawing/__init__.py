"""The stages of a call: its request checked, texts encoded, noise walked to latents, latents decoded.

It may import everything that computes. It does not know folders of weights, LoRA files or the pipeline classes.
"""
