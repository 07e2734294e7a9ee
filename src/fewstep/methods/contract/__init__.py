"""What every method is made of: options, objective, teacher, stage and plan."""
