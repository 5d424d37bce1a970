"""What is asked of a prediction: the loss and its weight per level, the bound, and how the times are drawn.

It may import `schedule` and `denoiser`. It does not know batches, networks or the loop.
"""
