"""Training of conversions: recipes, stages, controls."""
