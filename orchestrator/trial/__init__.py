"""What makes one row: the stages of a trial, the Ray Train run around them, networks measured as they are.

Imports: config, storage, models, datasets, cluster, latency, training, gator; Ray Train.
"""
