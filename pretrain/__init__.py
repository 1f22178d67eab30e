"""The application that makes encoders."""
