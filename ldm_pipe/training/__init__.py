"""What the training scripts share: run configs, exact checkpoints, EMA and the loop. It never samples a picture."""
