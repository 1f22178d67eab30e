"""From scans to masks in their own format and geometry, whatever computes the scores. Imports no torch, MONAI or pydantic."""
