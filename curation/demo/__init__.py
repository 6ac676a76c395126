"""A pool drawn on the spot, with its truth."""
