"""Whole models in one file: Stable Diffusion's and openai's, their names and shapes.

It may import the networks and `interop.folders`. It does not know how a picture is drawn.
"""
