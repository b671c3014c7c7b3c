"""Solvers: from noise to data in a number of steps."""
