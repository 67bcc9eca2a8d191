"""What happens before a search starts: its space is checked, its plan and cost forecast. Imports: config, storage, models, datasets."""
