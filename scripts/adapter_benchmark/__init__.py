"""The parts that the benchmarks of conversion and merging share."""
