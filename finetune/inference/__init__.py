"""From scans to masks in their own format and geometry."""
