"""A model out: the backbone with its head, the optimizer, the trainer."""
