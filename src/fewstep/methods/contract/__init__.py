"""The types that every method uses: options, objective, teacher, stage and plan."""
