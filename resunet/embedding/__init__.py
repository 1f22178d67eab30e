"""Features of an archive, and what is made of them: a table, a map, what to label next."""
