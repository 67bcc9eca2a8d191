"""A device that stands in for CUDA where there is none: its tensors say "gpu:0", and their numbers are on the CPU.

PrivateUse1, with torch's device guard in Python, is the device. StandInTensor is a wrapper subclass that says it is there and
holds a CPU tensor. StandIn is a dispatch mode that makes and runs such tensors, raises for operands on two devices as CUDA does
(host numbers and host indices pass), counts the ops that launch a kernel, and notes what waits for the device, with the line of
the project that asks.

Why not FakeTensorMode on "cuda": without a driver autograd raises, and prune(), recut() and aligned() read values.

Limits: branches on device.type == "cuda" are not taken; Module.to() unties tied parameters, hence moved(); PrivateUse1 can be
named once, so this needs a process of its own. Seen with torch 2.14, of which it uses private parts.
"""

import collections
import contextlib
import functools
import traceback
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    return_and_correct_aliasing,
)

aten = torch.ops.aten
NAME = "gpu"


@functools.cache
def _name_the_device() -> None:
    """Give PrivateUse1 its name, which changes the process for good: not when this file is imported, as the search for doctests does."""
    module = backend_registration._DummyBackendModule()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)


VIEWS = (
    *("view", "_unsafe_view", "reshape", "t", "permute", "expand", "detach", "alias", "unsqueeze", "as_strided"),
    *("lift_fresh", "squeeze", "split_with_sizes", "diagonal", "narrow", "empty_strided", "empty_like", "new_empty"),
    *(
        "new_empty_strided",
        "transpose.int",
        "slice.Tensor",
        "select.int",
        "squeeze.dim",
        "squeeze.dims",
        "split.Tensor",
    ),
    *("unbind.int", "view.dtype", "unfold", "empty.memory_format"),
)
READS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "repeat_interleave.Tensor"),
)
INDEXING = ("index.Tensor", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index.Tensor")
RETURN_HOST_VALUES = ("_local_scalar_dense", "equal")


def _overloads(names: tuple[str, ...]) -> set[Any]:
    parts = [name.partition(".") for name in names]
    return {getattr(getattr(aten, packet), overload or "default") for packet, _, overload in parts}


_VIEWS, _READS, _INDEXING, _RETURN_HOST_VALUES = map(_overloads, (VIEWS, READS, INDEXING, RETURN_HOST_VALUES))
_host_tensor = torch.tensor


class StandInTensor(Tensor):
    """A tensor on the stand-in device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> Self:
        """Return a tensor with the numbers of a CPU tensor."""
        return Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"StandInTensor({self.raw})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = StandInTensor(self.raw.detach().clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = (nn.Parameter if is_parameter else Tensor.requires_grad_)(copied, self.requires_grad)
        return memo[id(self)]

    def tolist(self) -> Any:
        """Return the numbers."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        """Return host data on this device: in C++ the copy would not be seen."""
        return _host_tensor(data, **{"dtype": self.dtype, **kwargs}).to(NAME)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """launches: number of ops that launch a kernel, by op. waits: how often the host waited, by what for and where."""

    current: Self | None = None

    def __init__(self) -> None:
        super().__init__()
        _name_the_device()
        self.launches: collections.Counter[Any] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()

    def reset(self) -> None:
        """Count from 0."""
        self.launches.clear()
        self.waits.clear()

    def __enter__(self) -> Self:
        StandIn.current, torch.tensor = self, _tensor
        self._threads = torch.autograd.set_multithreading_enabled(False)  # else the engine asks for a device's thread
        self._threads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._threads.__exit__(*error)
        StandIn.current, torch.tensor = None, _host_tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def moved(network: nn.Module) -> nn.Module:
    """Move a network to the stand-in device, in place; tied parameters stay tied."""
    there: dict[int, Any] = {}
    with contextlib.nullcontext() if StandIn.current is None else _disable_current_modes():
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in there:
                        copied = StandInTensor(tensor.detach().clone())
                        is_parameter = isinstance(tensor, nn.Parameter)
                        there[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
                    tensors[name] = None if tensor is None else there[id(tensor)]
    return network


def _tensor(data: Any, **kwargs: Any) -> Tensor:
    """Replace torch.tensor, whose copy to a device C++ would make unseen."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type != NAME:
        return _host_tensor(data, **kwargs)
    del kwargs["device"]
    return _host_tensor(data, **kwargs).to(device)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = [*_leaves(args), *_leaves(list(kwargs.values()))]
    wants_device = any(isinstance(x, torch.device) and x.type == NAME for x in (*args, *kwargs.values()))
    is_traced = any(isinstance(x, FakeTensor) for x in leaves) or any(
        isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()
    )
    if is_traced or not (wants_device or any(isinstance(x, StandInTensor) for x in leaves)):
        return func(*args, **kwargs)
    names_device = any(isinstance(x, torch.device) for x in (*args, *kwargs.values()))
    goes_to_host = func is aten._to_copy.default and names_device and not wants_device
    _check_devices(func, args, leaves)
    _note_waits(func, args, kwargs, leaves, goes_to_host)
    if StandIn.current is not None and func not in _VIEWS:
        StandIn.current.launches[func] += 1
    with _disable_current_modes():
        out = func(*map(_raw, args), **{key: _raw(value) for key, value in kwargs.items()})
    if goes_to_host or func in _RETURN_HOST_VALUES:
        return out
    if func is aten.copy_.default and not isinstance(args[0], StandInTensor):
        return args[0]
    wrapped = _mapped(out, lambda x: x if isinstance(x, StandInTensor) else StandInTensor(x))
    is_alias = func in _VIEWS or func._schema.is_mutable
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if is_alias else wrapped


def _check_devices(func: Any, args: tuple[Any, ...], leaves: list[Tensor]) -> None:
    """Raise RuntimeError for operands on two devices."""
    hosts = [x for x in leaves if not isinstance(x, StandInTensor)]
    if func in _INDEXING:
        is_mixed = not isinstance(args[0], StandInTensor) or any(
            x.dim() and not isinstance(x, StandInTensor) for x in _leaves(list(args[2:]))
        )
    else:
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        is_mixed = not is_copy and any(x.dim() for x in hosts)
    if is_mixed:
        shapes = [tuple(x.shape) for x in hosts]
        raise RuntimeError(f"{func}: expected all tensors on one device, found {NAME}:0 and cpu {shapes} at {_where()}")


def _note_waits(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Tensor], goes_to_host: bool
) -> None:
    is_copy, hosts = func is aten.copy_.default, [x for x in leaves if not isinstance(x, StandInTensor)]
    indices = [x for x in args[1] if x is not None] if func in _INDEXING else []
    what = None
    if goes_to_host or (is_copy and not isinstance(args[0], StandInTensor)):
        what = "device to host"
    elif (is_copy and hosts) or (func is aten._to_copy.default and hosts):
        what = "host to device"
    elif func in _READS or any(x.dtype == torch.bool for x in indices):
        what = f"reads ({func})"
    elif any(not isinstance(x, StandInTensor) for x in indices):
        what = "host to device (an index)"
    is_asynchronous = kwargs.get("non_blocking") or (is_copy and len(args) > 2 and args[2])
    if what is not None and not is_asynchronous and StandIn.current is not None:
        StandIn.current.waits[f"{what} at {_where()}"] += 1


def _where() -> str:
    """Return the line of the project that runs."""
    for frame in reversed(traceback.extract_stack()):
        is_own = "/gator/" in frame.filename or "/orchestrator/" in frame.filename
        if is_own and not any(part in frame.filename for part in ("site-packages", "/tests/")):
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.line}"
    return "elsewhere"


def _raw(argument: Any) -> Any:
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    return _mapped(argument, lambda x: x.raw if isinstance(x, StandInTensor) else x)


def _mapped(x: Any, function: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(_mapped(y, function) for y in x) if type(x) in (list, tuple) else x


def _leaves(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _leaves(y)
