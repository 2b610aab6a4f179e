"""Timing of h2rec beside its rivals; `pytest benchmarks` runs it, README.md explains it."""
