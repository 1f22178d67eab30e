"""Learning: patches, augmentation, losses, schedules, and what keeps statistics and weights steady."""
