"""Data sets packed into Parquet shards: the format, writing and reading. Imports: as datasets."""
