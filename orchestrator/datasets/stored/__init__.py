"""Images in files of a folder or an object store, read in groups: row groups of Parquet, runs of a tar. Imports: as datasets."""
