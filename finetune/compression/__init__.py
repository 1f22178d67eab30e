"""Smaller segmenters: structural pruning under a gate, then quantisation; `resunet compress`."""
