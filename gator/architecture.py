"""The whole result of pruning besides the weights: which channels of each group are kept."""

import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gator.errors import ArchitectureError
from gator.files import write_atomic
from gator.graph import ChannelGraph
from gator.selection import Selection

FORMAT = "gator.architecture"
VERSION = 1


@dataclass(frozen=True)
class Architecture:
    """Kept channels of every group of one graph. Normalised: a block with one empty group is empty altogether.

    Made by full(), from_keep(), load() or GatedModel.architecture().
    """

    keep: Mapping[str, tuple[int, ...]]
    """Group name -> kept channels, ascending, each in [0, num_channels)."""
    num_channels: Mapping[str, int]
    """Group name -> channels before pruning."""
    removed_blocks: tuple[str, ...]
    model: str
    """Class name of the network."""
    input_shapes: tuple[tuple[int, ...], ...]
    """Shapes of the example inputs of the trace."""
    selection: Selection
    """What the trace was told to include and exclude."""
    fingerprint: str
    """ChannelGraph.fingerprint of the graph it belongs to."""
    full_macs: int
    """Multiply-adds per image of the unpruned network, which costs are compared with; a record, for people."""

    @classmethod
    def full(cls, graph: ChannelGraph) -> Self:
        """Return the architecture that keeps everything."""
        return cls.from_keep(graph, {})

    @classmethod
    def from_keep(cls, graph: ChannelGraph, keep: Mapping[str, Iterable[int]]) -> Self:
        """Return the architecture that keeps the given channels; a group that is not named keeps all of them.

        Raises: ArchitectureError for an unknown group, an index out of range or given twice, or an empty group that is
        not inside a removable block.
        """
        checked = {group.name: tuple(range(group.num_channels)) for group in graph.groups}
        for name, indices in keep.items():
            checked[name] = _checked(graph, name, indices)
        gone = graph.removed_blocks({name: len(indices) for name, indices in checked.items()})
        checked.update((name, ()) for block in gone for name in block.groups)
        return cls(
            keep=checked,
            num_channels={group.name: group.num_channels for group in graph.groups},
            removed_blocks=tuple(block.name for block in gone),
            model=graph.model,
            input_shapes=graph.input_shapes,
            selection=graph.selection,
            fingerprint=graph.fingerprint,
            full_macs=graph.full_macs,
        )

    @property
    def widths(self) -> dict[str, int]:
        """Number of kept channels of each group."""
        return {name: len(indices) for name, indices in self.keep.items()}

    @property
    def digest(self) -> str:
        """Hash of what is kept of which graph; a weights file carries that of its architecture."""
        kept = json.dumps([self.fingerprint, {name: self.keep[name] for name in sorted(self.keep)}])
        return hashlib.sha256(kept.encode()).hexdigest()[:16]

    def check_fits(self, graph: ChannelGraph) -> None:
        """Raise ArchitectureError unless this architecture was made for a graph of this structure."""
        if self.fingerprint != graph.fingerprint:
            raise ArchitectureError(
                f"the architecture belongs to a {self.model} with fingerprint {self.fingerprint}, the graph is of a "
                f"{graph.model} with fingerprint {graph.fingerprint}; trace the network it was made for"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the architecture as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "include": None if self.selection.include is None else list(self.selection.include),
            "exclude": list(self.selection.exclude),
            "fingerprint": self.fingerprint,
            "full_macs": self.full_macs,
            "removed_blocks": list(self.removed_blocks),
            "groups": {
                name: {"num_channels": self.num_channels[name], "keep": list(kept)} for name, kept in self.keep.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "architecture") -> Self:
        """Return the architecture from JSON values. `where` names their origin in errors.

        Raises: ArchitectureError if they are not those of to_json(), or of a newer version.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArchitectureError(f"{where}: not a {FORMAT} file; expected the JSON that Architecture.save() writes")
        if data.get("version") != VERSION:
            raise ArchitectureError(
                f"{where}: version {data.get('version')!r}, this gator reads version {VERSION}; update gator"
            )
        try:
            groups = {str(name): _group_from_json(group) for name, group in data["groups"].items()}
            return cls(
                keep={name: kept for name, (_, kept) in groups.items()},
                num_channels={name: count for name, (count, _) in groups.items()},
                removed_blocks=tuple(str(name) for name in data["removed_blocks"]),
                model=str(data["model"]),
                input_shapes=tuple(tuple(int(size) for size in shape) for shape in data["input_shapes"]),
                selection=_selection_from_json(data),
                fingerprint=str(data["fingerprint"]),
                full_macs=int(data["full_macs"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArchitectureError(f"{where}: damaged: {type(error).__name__}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the architecture as JSON, atomically."""
        write_atomic(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the architecture from a file of save(). Raises: ArchitectureError, which names the file."""
        try:
            data = json.loads(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise ArchitectureError(f"{path}: no such file; expected an architecture.json") from error
        except ValueError as error:
            raise ArchitectureError(f"{path}: not JSON ({error}); the file is damaged or truncated") from error
        return cls.from_json(data, where=str(path))


def _checked(graph: ChannelGraph, name: str, indices: Iterable[int]) -> tuple[int, ...]:
    group = graph.by_name.get(name)
    if group is None:
        near = difflib.get_close_matches(name, graph.by_name, n=3) or list(graph.by_name)[:5]
        raise ArchitectureError(f"{graph.model} has no channel group {name!r}; did you mean {', '.join(near)}?")
    kept = sorted(int(index) for index in indices)
    if kept and not 0 <= kept[0] <= kept[-1] < group.num_channels:
        raise ArchitectureError(
            f"group {name}: channels {kept[0]} to {kept[-1]} given, expected 0 to {group.num_channels - 1}"
        )
    if len(set(kept)) < len(kept):
        twice = next(one for one, other in itertools.pairwise(kept) if one == other)
        raise ArchitectureError(f"group {name}: channel {twice} is given twice; expected each kept channel once")
    if not kept and group.block is None:
        raise ArchitectureError(
            f"group {name}: no channel kept; it is not inside a removable block, so keep at least one"
        )
    return tuple(kept)


def _selection_from_json(data: dict[str, Any]) -> Selection:
    include, exclude = data.get("include"), data.get("exclude", [])
    return Selection(None if include is None else tuple(map(str, include)), tuple(map(str, exclude)))


def _group_from_json(group: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    count, kept = group["num_channels"], tuple(group["keep"])
    if not isinstance(count, int) or any(not isinstance(index, int) or not 0 <= index < count for index in kept):
        raise ValueError(f"kept channels must be integers in [0, {count})")
    if list(kept) != sorted(set(kept)):
        raise ValueError("kept channels must be ascending, each once")
    return count, kept
