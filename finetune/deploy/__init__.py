"""From a run to what a product ships."""
