"""Training: one step for many adapters, the loop around it, checkpoints."""
