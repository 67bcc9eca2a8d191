"""Ray, MLflow and data around the method in `gator`: the commands at the top, below them a folder for each part."""
