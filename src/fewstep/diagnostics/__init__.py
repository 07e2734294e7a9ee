"""Measures of a flow: straightness, curvature, error, stiffness, likelihood; grids and solvers fitted to it."""
