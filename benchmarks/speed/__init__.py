"""How fast a step is and what it holds: beside TRL's `GKDTrainer`, and beside the parts that it is made of."""

from benchmarks.speed.report import plot, table

__all__ = ["plot", "table"]
