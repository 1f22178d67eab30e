"""Before training: what the data are, what the recipe should say, what it costs, and whether it can learn."""
