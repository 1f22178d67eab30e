"""The application that makes segmenters."""
