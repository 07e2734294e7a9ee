"""How far a velocity field is from being its own one-step flow map."""
