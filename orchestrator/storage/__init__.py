"""The run directory: every file name in it, and how files are written, read, locked and waited for. Imports: config."""
