"""The door through which training, evaluation and their pictures read images: the reader of curation, and no other.

Curation keeps the original bytes, so training must read whatever curation's reader can, and see the same pixels.
"""

from curation.reading.pictures.images import EXTRA_SUFFIXES, SUFFIXES, Damaged, EncodedImage, ImageLimits, open_image

__all__ = ["IMAGE_SUFFIXES", "Damaged", "EncodedImage", "ImageLimits", "open_image"]

IMAGE_SUFFIXES = SUFFIXES | EXTRA_SUFFIXES | {"img"}
"""of members that are images; img: curation's word where a format has no suffix"""
