"""What a search has found, and how it is shown. Imports: config, storage, pareto, gator."""
