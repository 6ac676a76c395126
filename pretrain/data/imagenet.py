"""What pixels are normalised by: the statistics of ImageNet, as in every published model of both families."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""of red, green and blue, of values from 0 to 1"""
IMAGENET_STD = (0.229, 0.224, 0.225)
