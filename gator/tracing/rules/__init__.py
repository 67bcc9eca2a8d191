"""The rules by which channels pass through each ATen op, a file per family.

A rule is a short function from the walk and a node of torch.export's graph to the labels of the node's value. To add an op,
write such a function, register it with @rule, and add a network with the op to tests/gator/zoo.py. An op without a rule locks
the channels that flow into it; it is never assumed to be element-wise.
"""

from gator.tracing.rules import elementwise, layers, movement, pooling, products
from gator.tracing.rules.table import RULES

__all__ = ["RULES", "elementwise", "layers", "movement", "pooling", "products"]
