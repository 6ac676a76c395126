"""Exports that run by themselves: their files, and the names of what goes in and comes out. Without torch."""

PROGRAM_FILES = {"onnx": "model.onnx", "torch_export": "model.pt2", "torchscript": "model.ts"}
PROGRAM_CONFIG = "config.json"
"""beside each: what the model is, and what it expects of its images"""
INPUT, OUTPUTS = "images", ("cls", "registers", "patches")
