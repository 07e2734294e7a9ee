"""The training engine: it knows roles, turns and samples seen, and no paper."""
