"""Recipes: stages, resumption, comparison."""
