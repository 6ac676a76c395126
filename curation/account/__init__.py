"""What was decided and why, for people and programs: decisions, explain, truth, the report."""
