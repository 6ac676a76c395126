"""Does curated beat raw: a raw pool with known truth, and equal numbers of images cut from it in five ways."""
