"""Distillation: a segmenter that learns from another one beside the labels, over labelled and unlabelled scans."""
