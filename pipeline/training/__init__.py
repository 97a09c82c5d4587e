"""Training: the backbone with its head, the optimizer, the trainer and checkpoints."""
