"""How the student learns: the loop, the optimizer step, checkpoints and records."""
