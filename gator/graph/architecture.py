"""The architecture: which channels of each group are kept, the result of pruning apart from the weights."""

import difflib
import hashlib
import itertools
import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from gator.errors import ArchitectureError
from gator.files import write_atomic
from gator.graph.graph import ChannelGraph
from gator.graph.selection import Selection

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
    input_dtypes: tuple[str, ...]
    """Their dtypes, such as "float32" and "int64"; floating point in files of before these were stored."""
    selection: Selection
    """The include and exclude arguments of the trace."""
    fingerprint: str
    """ChannelGraph.fingerprint of the graph it belongs to."""
    full_macs: int
    """MACs per image of the unpruned network, for the reader; no code uses it."""

    @classmethod
    def full(cls, graph: ChannelGraph) -> Self:
        """Return the architecture that keeps everything."""
        return cls.from_keep(graph, {})

    @classmethod
    def from_keep(cls, graph: ChannelGraph, keep: Mapping[str, Iterable[int]]) -> Self:
        """Return the architecture that keeps the given channels; a group that is not named keeps all its channels.

        Raises: ArchitectureError for an unknown or locked group, an index that is not an integer, out of range or repeated, or
        an empty group that is not inside a removable block.
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
            input_dtypes=graph.input_dtypes,
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
        """Hash of the graph and the kept channels; a weights file has that of its architecture."""
        kept = json.dumps([self.fingerprint, {name: self.keep[name] for name in sorted(self.keep)}])
        return hashlib.sha256(kept.encode()).hexdigest()[:16]

    def check_fits(self, graph: ChannelGraph) -> None:
        """Raise ArchitectureError unless this is an architecture that from_keep() makes for a graph of this structure."""
        if self.fingerprint != graph.fingerprint:
            raise ArchitectureError(
                f"the architecture belongs to a {self.model} with fingerprint {self.fingerprint}, the graph is of a "
                f"{graph.model} with fingerprint {graph.fingerprint}; trace the network it was made for"
            )
        expected = Architecture.from_keep(graph, self.keep)
        for field in ("num_channels", "keep", "removed_blocks"):
            if getattr(self, field) != getattr(expected, field):
                raise ArchitectureError(
                    f"the architecture has the fingerprint of the graph, {self.fingerprint}, but its {field} is not what "
                    f"Architecture.from_keep() makes of the kept channels; the file was edited, so save the architecture again"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the architecture as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "input_dtypes": list(self.input_dtypes),
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

        Raises: ArchitectureError unless to_json() of this version made them.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArchitectureError(f"{where}: not a {FORMAT} file; expected the JSON that Architecture.save() writes")
        if data.get("version") != VERSION:
            raise ArchitectureError(
                f"{where}: version {data.get('version')!r}, this gator reads version {VERSION}; update gator"
            )
        try:
            input_shapes = tuple(_all(int, shape) for shape in _all(list, data["input_shapes"]))
            groups = {name: _group_from_json(group) for name, group in _one(dict, data["groups"]).items()}
            return cls(
                keep={name: kept for name, (_, kept) in groups.items()},
                num_channels={name: count for name, (count, _) in groups.items()},
                removed_blocks=_all(str, data["removed_blocks"]),
                model=_one(str, data["model"]),
                input_shapes=input_shapes,
                input_dtypes=_dtypes(data.get("input_dtypes", ["float32"] * len(input_shapes)), len(input_shapes)),
                selection=Selection(
                    None if data["include"] is None else _all(str, data["include"]), _all(str, data["exclude"])
                ),
                fingerprint=_one(str, data["fingerprint"]),
                full_macs=_one(int, data["full_macs"]),
            )
        except KeyError as error:
            raise ArchitectureError(f"{where}: damaged: {error} is missing; save the architecture again") from error
        except (TypeError, ValueError) as error:
            raise ArchitectureError(f"{where}: damaged: {error}; save the architecture again") from error

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
        except OSError as error:
            raise ArchitectureError(
                f"{path}: cannot be read ({error.strerror}); expected an architecture.json"
            ) from error
        except (ValueError, RecursionError) as error:  # RecursionError: ten thousand brackets
            raise ArchitectureError(f"{path}: not JSON ({error}); the file is damaged or truncated") from error
        return cls.from_json(data, where=str(path))


def _checked(graph: ChannelGraph, name: str, indices: Iterable[int]) -> tuple[int, ...]:
    group = graph.by_name.get(name)
    if group is None:
        raise ArchitectureError(_why_no_group(graph, name))
    kept = _integers(name, indices)
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


def _why_no_group(graph: ChannelGraph, name: str) -> str:
    for locked in graph.locked:
        if locked.name == name:
            return f"group {name!r} of {graph.model} is locked: {locked.reason}; leave it out"
    near = difflib.get_close_matches(str(name), graph.by_name, n=3) or list(graph.by_name)[:5]
    advice = f"did you mean {', '.join(near)}?" if near else "no group can be pruned"
    return f"{graph.model} has no channel group {name!r}; {advice}"


def _integers(name: str, indices: Iterable[int]) -> list[int]:
    """Return the indices in ascending order. A mask of booleans is refused: its entries would pass as channels 0 and 1."""
    try:
        given = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        if any(isinstance(index, bool) for index in given):
            raise TypeError("booleans; mask.nonzero().flatten() are the indices of a mask")
        return sorted(map(operator.index, given))
    except TypeError as error:
        raise ArchitectureError(f"group {name}: expected the kept channels as integers: {error}") from error


Json = TypeVar("Json", str, int, list, dict)


def _one(kind: type[Json], value: Any) -> Json:
    """Return a JSON value that must be of exactly this type; True is not an int."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {str(value)[:60]!r}")
    return value


def _all(kind: type[Json], values: Any) -> tuple[Json, ...]:
    return tuple(_one(kind, value) for value in _one(list, values))


def _dtypes(values: Any, count: int) -> tuple[str, ...]:
    names = _all(str, values)
    if len(names) != count or any(not isinstance(getattr(torch, name, None), torch.dtype) for name in names):
        raise ValueError(
            f"input_dtypes are {list(names)}; expected the name of a dtype of torch for each of {count} inputs"
        )
    return names


def _group_from_json(group: Any) -> tuple[int, tuple[int, ...]]:
    group = _one(dict, group)
    count, kept = _one(int, group["num_channels"]), _all(int, group["keep"])
    if count < 1:
        raise ValueError("num_channels must be at least 1")
    if any(not 0 <= index < count for index in kept):
        raise ValueError(f"kept channels must be integers in [0, {count})")
    if list(kept) != sorted(set(kept)):
        raise ValueError("kept channels must be ascending, each once")
    return count, kept
