"""From YAML to a checked plan; nothing has started yet. Imports: config, storage, models, datasets."""
