"""A trained backbone as a function of uint8 images, run by torch, or by onnxruntime where there is no torch."""
