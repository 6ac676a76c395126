"""What a run will read, do, write and take, before it starts."""
