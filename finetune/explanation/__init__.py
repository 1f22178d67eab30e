"""What a prediction rests on: Grad-CAM of whole scans and of single lesions."""
