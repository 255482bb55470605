"""Students made from teachers."""
