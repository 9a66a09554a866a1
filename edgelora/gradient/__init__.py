"""Exact gradients through a quantised base in numpy, one matrix in float at a time."""
