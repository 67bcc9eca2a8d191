"""How fast a network is: timing, estimates, latency tables. Imports: config, storage, models, cluster, gator."""
