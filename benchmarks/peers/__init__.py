"""Published code that ours is measured against, with the numbers of our configs."""
