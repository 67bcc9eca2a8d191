"""The selection of modules that may be pruned: trace(..., include=..., exclude=...)."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from gator.errors import TraceError


@dataclass(frozen=True)
class Selection:
    """Module names, prefixes of them or glob patterns; a prefix stands for the module and all that is in it."""

    include: tuple[str, ...] | None = None
    """None is everything."""
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, include: str | Sequence[str] | None, exclude: str | Sequence[str]) -> "Selection":
        """Return the selection. Raises: TraceError if a name or pattern matches no module of `model`."""
        names = [name for name, _ in model.named_modules() if name]
        selection = cls(None if include is None else _patterns(include), _patterns(exclude))
        for argument, patterns in (("include", selection.include or ()), ("exclude", selection.exclude)):
            for pattern in patterns:
                if not any(_matches(name, pattern) for name in names):
                    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:5]
                    raise TraceError(
                        f"{argument}={pattern!r} matches no module of {type(model).__name__}; did you mean {', '.join(near)}?"
                    )
        return selection

    def why_not(self, modules: Iterable[str]) -> str | None:
        """Return why channels written by these modules must stay; None when they may be pruned."""
        for module in sorted(modules):
            if self.include is not None and not any(_matches(module, pattern) for pattern in self.include):
                return f"{module} is not among include={list(self.include)}"
            for pattern in self.exclude:
                if _matches(module, pattern):
                    return f"{module} is excluded by {pattern!r}"
        return None


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(module: str, pattern: str) -> bool:
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
