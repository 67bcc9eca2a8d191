"""Checks that pruning is exact: a traced network before training, and each pruned one. Imports: graph, costs, tracing, pruning, gating."""
