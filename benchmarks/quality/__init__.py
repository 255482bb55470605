"""Objectives compared by what their students have learnt, from the same warm starts."""
