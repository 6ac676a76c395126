"""Where samples come from and what they are: listing, tars, Parquet files, folders, image bytes."""
