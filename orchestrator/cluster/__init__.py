"""Ray itself: start or join a cluster, what fits on it, processes, signals. The only room that calls ray.init. Imports: config, storage."""
