"""Solvers as tables of numbers, and the one loop that runs any of them."""
