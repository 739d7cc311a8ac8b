"""What to load and what to save: the part of a connector that knows no engine."""
