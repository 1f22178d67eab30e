"""Folds by group, what they predict of the cases they did not see, and their ensemble."""
