"""A network and an architecture -> a smaller network, and its files. Imports: graph, costs, tracing."""
