"""Evaluations of patch features: linear segmentation, linear depth, objects without labels."""
