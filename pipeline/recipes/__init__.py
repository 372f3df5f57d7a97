"""What the user writes: recipes, parameter schedules, mergekit YAML."""
