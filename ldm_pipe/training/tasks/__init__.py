"""What a batch is and which loss it has, for each thing that is trained.

It may import `training.run` and `training.objectives`. It does not know processes or checkpoints: the loop does.
"""
