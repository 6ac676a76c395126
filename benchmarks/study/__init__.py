"""What an experiment is made of: its description, its kinds of variants, how one is judged, what it leaves."""
