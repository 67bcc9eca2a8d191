"""The tree of errors.

    GatorError
    ├── TraceError         the model cannot be traced, or the example inputs do not fit it
    ├── ArchitectureError  an architecture that does not fit its graph, or an invalid file
    ├── GateError          a gate setting out of range, a target that cannot be reached
    ├── PruneError         a network that cannot be pruned as requested
    ├── VerificationError  a network that gator prunes, gates or counts wrongly
    ├── ArtifactError      a saved network that cannot be loaded
    └── LatencyError       a measurement that cannot be made as requested

All children are ValueErrors too: each names the given value, the expected one, the place, and what to do.
"""


class GatorError(Exception):
    """Base of every error that gator raises on purpose."""


class TraceError(GatorError, ValueError):
    """The model cannot be traced, or the example inputs do not fit it."""


class ArchitectureError(GatorError, ValueError):
    """An architecture that does not fit its graph, or an invalid file."""


class GateError(GatorError, ValueError):
    """A gate setting out of range, or a target that cannot be reached."""


class PruneError(GatorError, ValueError):
    """A network that cannot be pruned as requested."""


class VerificationError(GatorError, ValueError):
    """A network that gator prunes, gates or counts wrongly. Raised by verify(), before anything is trained."""


class ArtifactError(GatorError, ValueError):
    """A saved network that cannot be loaded."""


class LatencyError(GatorError, ValueError):
    """A measurement that cannot be made as requested."""
