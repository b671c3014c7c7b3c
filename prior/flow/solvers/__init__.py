"""Solvers of the dynamics of a flow, and the time grids on which they step."""
