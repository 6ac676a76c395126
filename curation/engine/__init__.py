"""What stages stand on: Ray tasks, the run folder with its lock and manifests, and progress."""
