"""Before pretraining: what the data are, what the run costs, and what the network will be shown."""
