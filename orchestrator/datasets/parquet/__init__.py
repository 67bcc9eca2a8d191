"""The packed form of a data set: its format, how it is written and how it is read. Imports: as datasets."""
