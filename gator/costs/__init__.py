"""Group widths -> a number, differentiable; a new cost goes into counted.py. Imports: graph."""
