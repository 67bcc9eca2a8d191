"""Plain PyTorch: one epoch, one evaluation, one checkpoint. No Ray, no MLflow. Imports: config, storage, datasets, gator."""
