"""Errors of the method, drawn as a tree.

    GatorError
    ├── TraceError         the model cannot be followed, or the example inputs do not fit it
    ├── ArchitectureError  an architecture that does not fit its graph, or a file that is none
    ├── GateError          a gate setting out of range, a target that cannot be reached
    ├── PruneError         a network that cannot be cut as asked
    ├── ArtifactError      a saved network that cannot be read back
    └── LatencyError       a measurement that cannot be made as asked

All children are ValueErrors too: each tells what a caller gave, what was expected, where, and what to do.
"""


class GatorError(Exception):
    """Base of every error that gator raises on purpose."""


class TraceError(GatorError, ValueError):
    """The model cannot be followed, or the example inputs do not fit it."""


class ArchitectureError(GatorError, ValueError):
    """An architecture that does not fit its graph, or a file that holds none."""


class GateError(GatorError, ValueError):
    """A gate setting out of range, or a target that cannot be reached."""


class PruneError(GatorError, ValueError):
    """A network that cannot be cut as asked."""


class ArtifactError(GatorError, ValueError):
    """A saved network that cannot be read back."""


class LatencyError(GatorError, ValueError):
    """A measurement that cannot be made as asked."""
