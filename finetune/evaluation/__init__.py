"""How good a segmentation is: voxels, surfaces, objects, alarms, calibration; figures, files and pages."""
