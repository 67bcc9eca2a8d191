"""How long a forward pass takes, and the cost built from such times. Imports: graph, costs."""
