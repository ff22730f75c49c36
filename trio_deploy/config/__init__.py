"""What users write: recipes, targets and options. Parsing alone."""
