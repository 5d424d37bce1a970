"""The run of a training: config, loop, checkpoints, averages, several processes, records.

It may import `pretrained` and `data`. It does not know which network learns what: it knows parts with a loss.
"""
