"""Fine-tuning of a finished pipeline: all weights, some, LoRA, a new word, inpainting, DreamBooth.

It may import pipelines. It does not know how a run is kept.
"""
