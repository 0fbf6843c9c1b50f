"""Benchmarks and the figures made from recorded files."""
