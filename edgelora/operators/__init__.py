"""The meta-operator: distances between datasets to coefficients, and the judge of candidates."""
