"""Models: loading and saving, the trunk with its roles and heads, attention over trees, and the check of both ways."""
