"""Facts and decisions without side effects: coefficients, geometry, the choice of an algorithm, and every check."""
