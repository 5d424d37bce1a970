"""Folders in diffusers' layout and `ldm_pipe.json`, read into the parts of a model and written from them.

It may import the parts of a model and `schedule`. It does not know how a picture is drawn.
"""
