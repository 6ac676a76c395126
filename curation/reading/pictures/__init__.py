"""The one reader of image bytes, for both halves."""
