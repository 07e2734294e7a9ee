"""The training engine. It depends on roles, turns and samples seen, and not on a method."""
