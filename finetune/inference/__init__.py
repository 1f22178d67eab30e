"""From scans to masks with the live network; what a bundle does alike is in `resunet.inference`."""
