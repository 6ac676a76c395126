"""Views of images to unit-norm rows: offline descriptors, timm, Hugging Face, TorchScript; and their weights."""
