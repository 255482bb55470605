"""Benchmarks: ratios within one run on one machine. Not part of the installed package."""
