"""Checks during training that stop a run which collapses, and keep its best weights."""
