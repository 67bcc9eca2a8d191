"""Modules of a copy of a network: what each refers to is in the copy, and the forward pass of each can be replaced.

A forward pass belongs to a class, or to the instance: a method, partial or closure that timm, accelerate and others put in place
of the class's own. A replaced forward keeps the module: its attributes, its hooks and, by a subclass, its class.
"""

import copy
import functools
import textwrap
import types
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package.importer import sys_importer

from gator.pruning.writing import Forward

_OWN = ("_parameters", "_buffers", "_modules")


def rebind(module: nn.Module, copies: Mapping[int, Any]) -> None:
    """Let the attributes of a copied module refer to other copies where they still refer to originals.

    copies: id of an original module -> its copy.
    """
    for name, value in module.__dict__.items():
        if name not in _OWN:
            module.__dict__[name] = _rebound(value, copies)


def _rebound(value: Any, copies: Mapping[int, Any]) -> Any:
    """Return a value with copies in place of original modules; the value itself if there are none in it."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, weakref.ref):
        target = value()
        return value if target is None or id(target) not in copies else weakref.ref(copies[id(target)])
    if isinstance(value, types.MethodType):
        owner = _rebound(value.__self__, copies)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, copies)
    if isinstance(value, functools.partial):
        return _rebound_partial(value, copies)
    if isinstance(value, (list, tuple, dict)):
        return _rebound_container(value, copies)
    return value


def _rebound_function(function: types.FunctionType, copies: Mapping[int, Any]) -> types.FunctionType:
    cells = [cell for cell in function.__closure__ or () if cell != types.CellType()]  # an empty one is not filled yet
    contents = [cell.cell_contents for cell in cells]
    changed = [value if value is function else _rebound(value, copies) for value in contents]
    if all(new is old for new, old in zip(changed, contents, strict=True)):
        return function
    closure = tuple(types.CellType(value) for value in changed)
    new = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(new, function)  # type: ignore[return-value]


def _rebound_partial(value: functools.partial[Any], copies: Mapping[int, Any]) -> functools.partial[Any]:
    parts = value.func, value.args, value.keywords
    function, args, kwargs = _rebound_container(parts, copies)
    if all(new is old for new, old in zip((function, args, kwargs), parts, strict=True)):
        return value
    new = functools.partial(function, *args, **kwargs)
    new.__dict__.update(value.__dict__)
    return new


def _rebound_container(value: Any, copies: Mapping[int, Any]) -> Any:
    old = list(value.values()) if isinstance(value, dict) else list(value)
    new = [_rebound(part, copies) for part in old]
    if all(one is other for one, other in zip(new, old, strict=True)):
        return value
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update(zip(value, new, strict=True))
        return changed
    return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)


def class_of_its_own(module: nn.Module) -> type[nn.Module]:
    """Return the class for a copy of a module: a torch.fx graph sets its forward on its class, so each copy needs one."""
    cls = type(module)
    if not isinstance(module, GraphModule) or isinstance(module, _Replaced):
        return cls
    return type(cls.__name__, cls.__bases__, {"forward": cls.forward, "__qualname__": cls.__qualname__})


def copied(model: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a deep copy of a network. replaced: by id of a tensor, the one in its place.

    A tensor that a module has computed and keeps as an attribute, as torch.nn.utils.weight_norm does, is detached: torch copies no
    others. A torch.fx graph keeps its hooks and attributes, which its own way of being copied drops.
    """
    memo: dict[int, Any] = dict(replaced or {})
    for module in model.modules():
        computed = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        memo.update((id(value), value.detach()) for value in computed)
    graphs = [module for module in model.modules() if isinstance(module, GraphModule)]
    for module in graphs:
        memo[id(module)] = object.__new__(class_of_its_own(module))
    for module in graphs:
        memo[id(module)].__dict__.update(copy.deepcopy(module.__dict__, memo))
    small = copy.deepcopy(model, memo)
    copies = {id(module): memo[id(module)] for module in model.modules()}
    for module in small.modules():
        rebind(module, copies)
    return small


# --- replacing a forward pass -----------------------------------------------------------------------------------------


class _Replaced:
    """Mixed into the class of a module whose forward pass was replaced."""

    _source: str
    _globals: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Replaced":
        memo[id(self)] = new = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        imports = _format_import_block(self._globals, sys_importer)
        state: dict[str, Any] = self.__getstate__()  # type: ignore[assignment]
        state.pop("_graph", None)
        cls = type(self)
        return _empty, (cls.__bases__[1], cls.__name__, imports + self._source), state


def _empty(base: type[nn.Module], name: str, source: str) -> nn.Module:
    return object.__new__(_replaced_class(base, name, source, {}))


def _replaced_class(base: type[nn.Module], name: str, source: str, names: dict[str, Any]) -> type[nn.Module]:
    body = {
        "forward": _forward_from_src(source, names),
        "_source": source,
        "_globals": names,
        "__module__": base.__module__,
    }
    return type(name, (_Replaced, base), body)


def _code(forward: Forward) -> tuple[str, dict[str, Any]]:
    """Return the source of a forward pass and the names that it uses; that of training mode is a function inside it."""
    code = forward.graph.python_code("self")
    if forward.in_training is None:
        return code.src, code.globals
    training = forward.in_training.python_code("self")
    arguments = ", ".join(str(node.target) for node in forward.graph.find_nodes(op="placeholder"))
    end = code.src.index("\n", code.src.index("def forward(")) + 1
    inner = textwrap.indent(training.src.strip().replace("def forward(", "def in_training(", 1), " " * 8)
    chosen = f"    if self.training:\n{inner}\n        return in_training(self, {arguments})\n"
    return code.src[:end] + chosen + code.src[end:], {**training.globals, **code.globals}


def replace_forward(module: nn.Module, forward: Forward, prefix: str) -> None:
    """Give a module a generated forward pass: its class becomes a subclass of its class, of that name after `prefix`."""
    cls = type(module)
    if isinstance(module, _Replaced):
        base = cls.__bases__[1]
    elif isinstance(module, GraphModule):
        base = GraphModule
        module.__dict__["_graph"] = forward.graph
    else:
        base = cls
    source, names = _code(forward)
    module.__dict__.pop("forward", None)
    module.__class__ = _replaced_class(base, f"{prefix}{base.__name__.removeprefix(prefix)}", source, names)
    if isinstance(module, nn.MultiheadAttention):
        module._qkv_same_embed_dim = False  # else the fused kernel of nn.TransformerEncoderLayer passes forward() by
