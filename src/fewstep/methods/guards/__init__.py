"""Measurements during training that stop a run whose samples become much worse, and keep its best weights."""
