"""Gates on channels, and how they are trained. Imports: graph, costs, tracing, pruning."""
