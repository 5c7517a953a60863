"""Ready experiments, with the small checkpoints that they start from."""
