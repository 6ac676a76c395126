"""Shards as bytes: tars, Parquet files, the members of a sample, the dataset card."""
