"""Pruning searches on Ray with MLflow, around the method in `gator`: the commands at the top, a folder for each part below."""
