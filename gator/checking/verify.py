"""Verifying a graph: cuts some random architectures, and compares the networks that come out with one another and with an oracle."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gator.checking.oracle import averaged_groups, silenced
from gator.checking.parting import first_parting
from gator.costs.counted import AttentionCost, MacsCost, ParamsCost
from gator.errors import VerificationError
from gator.gating.gated import GatedModel
from gator.gating.gates import GateConfig
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph
from gator.pruning.prune import prune
from gator.tracing.inputs import checked_inputs

TOLERANCE = 1e-8
"""Relative to the largest output, in float64: what was seen of exact networks is below 1e-12."""


def verify(model: nn.Module, graph: ChannelGraph, example_inputs: Tensor | Sequence[Tensor], seed: int = 0) -> None:
    """Raise VerificationError if gator prunes, gates or counts this network wrongly. `model` does not change.

    Cuts two random architectures, with removable blocks gone, groups of one channel and groups that lack one, and checks in float64 that
    the pruned network, the gated one and an oracle (gator.checking.oracle) agree in eval mode; that pruned and gated agree in training mode;
    that the gated network with all gates open is `model`; that a sample does not depend on another one's mask; that gates and
    weights get finite gradients; and that the costs are those that torch counts.

    example_inputs: as for trace(). Constant ones are replaced by noise; weights that are all equal too, in the copy that is checked.

    Takes about 20 forward passes of two samples in float64, and three times the network's memory in float64. Weights do not matter:
    what it checks is the structure, so once per network is enough.
    """
    if not graph.groups:
        return
    devices = {p.device for p in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng([d for d in devices if d.type == "cuda"]), _plain_attention():
        torch.manual_seed(seed)
        subject = _Subject(_lively(copy.deepcopy(model).double()), graph, _two_samples(model, example_inputs))
        for keep in (_random_half(graph), _extremes(graph)):
            subject.check(Architecture.from_keep(graph, keep))
        subject.check_open()
        subject.check_training()


class _Subject:
    """One network under test, in float64."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, inputs: tuple[Tensor, ...]) -> None:
        self.model, self.graph, self.inputs = model.eval(), graph, inputs
        self.gated = GatedModel(model, graph, GateConfig(init_keep_prob=0.6)).double().eval()

    def check(self, architecture: Architecture) -> None:
        """Check the outputs and the costs of one architecture."""
        if (found := self._difference(architecture)) is not None:
            raise VerificationError(self._where(architecture, *found))
        self._check_costs(architecture)

    # --- outputs --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _difference(self, architecture: Architecture) -> tuple[str, nn.Module, nn.Module] | None:
        """Return how the pruned network differs from a reference, and both; None if it agrees with all."""
        pruned = prune(self.model, self.graph, architecture)
        output = pruned(*self.inputs)
        self.gated.load_architecture(architecture)
        if (text := differs(output, self.gated(*self.inputs))) is not None:
            return f"the pruned and the gated network differ{text}", pruned, self.gated
        if not self._is_random:
            mask_NC = self.graph.mask_of(architecture.keep).double().expand(2, -1)
            if (text := differs(pruned.train()(*self.inputs), self._trained(lambda: self.masked(mask_NC)))) is not None:
                return f"in training mode the pruned and the gated network differ{text}", pruned, self.gated
        oracle = silenced(self.model, self.graph, architecture)
        if oracle is None or not _is_finite(expected := oracle(*self.inputs)):
            return None
        if (text := differs(output, expected)) is not None:
            return f"the pruned network and the unpruned one without the closed channels differ{text}", pruned, oracle
        return None

    def _where(self, architecture: Architecture, text: str, pruned: nn.Module, reference: nn.Module) -> str:
        """Return the message about a difference, with the group that makes it."""
        cut = [name for name, kept in architecture.keep.items() if len(kept) < architecture.num_channels[name]]

        def of(names: Sequence[str]) -> Architecture:
            """Return the architecture in which only these groups are cut as in the one that fails."""
            return Architecture.from_keep(self.graph, {name: architecture.keep[name] for name in names})

        def fails(names: Sequence[str]) -> bool:
            return self._difference(of(names)) is not None

        number = _smallest_prefix(cut, fails)
        culprit = cut[number - 1]
        rest = ""
        if (found := self._difference(of([culprit]))) is None:
            found, rest = self._difference(of(cut[:number])), f" and of {', '.join(cut[: number - 1][:3])}"
        text, pruned, reference = found or (text, pruned, reference)
        place = first_parting(pruned, reference, self.inputs)
        return (
            f"{self.graph.model}: when channels of group {culprit!r}{rest} are removed, {text}{place}. gator prunes this network "
            f"wrongly, please report it; exclude=[{culprit.partition('#')[0]!r}] leaves these channels"
        )

    def _check_costs(self, architecture: Architecture) -> None:
        pruned = prune(self.model, self.graph, architecture)
        one = tuple(x[:1] if len(x) == len(self.inputs[0]) else x for x in self.inputs)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            pruned(*one)
        counted = counter.get_total_flops() / 2
        priced = MacsCost(self.graph)(architecture) + AttentionCost(self.graph)(architecture)
        if abs(counted - priced) > 1e-9 * counted:
            by_op = {str(op): flops / 2 for op, flops in counter.get_flop_counts()["Global"].items()}
            raise VerificationError(
                f"{self.graph.model}: MacsCost and AttentionCost say {priced:,.0f} multiply-adds, torch counts {counted:,.0f} ({by_op})"
            )
        num_params, said = sum(p.numel() for p in pruned.parameters()), ParamsCost(self.graph)(architecture)
        if num_params != said:
            raise VerificationError(f"{self.graph.model}: ParamsCost says {said:,.0f}, the pruned network has {num_params:,}")

    # --- the gated network ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_open(self) -> None:
        """Check the gated network with all gates open, and with one mask for each sample."""
        full = Architecture.full(self.graph)
        self.gated.load_architecture(full)
        if (text := differs(self.gated(*self.inputs), self.model(*self.inputs))) is not None:
            raise VerificationError(f"{self.graph.model}: the gated network with all gates open and the network differ{text}")
        one, other, another = (self.graph.mask_of(_random_half(self.graph)).double() for _ in range(3))
        outputs = [self.masked(torch.stack(masks)) for masks in ((one, other), (one, another))]
        first, second = ([part[:1] for part in _tensors(output) if len(part) == 2] for output in outputs)
        if (text := differs(first, second)) is not None:
            raise VerificationError(f"{self.graph.model}: a sample's output changes with the mask of another sample{text}")

    def masked(self, mask_NC: Tensor) -> Any:
        """Return the gated network's output under given masks."""
        gates = self.gated.gates
        self.gated._masks.fill(mask_NC.to(gates.keep_C.device), gates.alive_B(gates.count(gates.open_C())), self.gated._group_sizes)
        return self.gated.network(*self.inputs)

    def check_training(self) -> None:
        """Check training mode: the same output when all is open, and finite gradients under random masks."""
        self.gated.load_architecture(Architecture.full(self.graph))
        with torch.no_grad():
            text = differs(self._trained(self._masked_open), self._trained(self._ungated))
        if text is not None and not self._is_random:
            raise VerificationError(
                f"{self.graph.model}: in training mode the gated network with all gates open and the network differ{text}"
            )
        if self._are_finite(self._gradients(self._ungated)):
            gradients = self._gradients(lambda: self.gated(*self.inputs))
            name = next((name for name, gradient in gradients.items() if not self._are_finite({name: gradient})), None)
            if name is not None:
                raise VerificationError(f"{self.graph.model}: the gradient of {name} under random masks is not finite")

    def _ungated(self) -> Any:
        return self.model(*self.inputs)

    def _masked_open(self) -> Any:
        return self.masked(torch.ones(2, self.graph.num_channels, dtype=torch.float64))

    @cached_property
    def _is_random(self) -> bool:
        """Whether training mode draws numbers, so that outputs cannot be compared."""
        with torch.no_grad():
            return differs(self._trained(self._ungated), self._trained(self._ungated, seed=1)) is not None

    def _gradients(self, run: Callable[[], Any]) -> dict[str, Tensor | None]:
        """Return the gradients of a training step, by name."""

        def step() -> None:
            """Run forward and backward."""
            losses = [part.square().mean() for part in _tensors(run()) if part.requires_grad]
            torch.stack(losses).sum().backward()

        self.gated.zero_grad()
        self._trained(step)
        named = [("the gates", self.gated.gates.logits_C), *self.model.named_parameters()]
        return {name: parameter.grad for name, parameter in named}

    @staticmethod
    def _are_finite(gradients: dict[str, Tensor | None]) -> bool:
        return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients.values())

    def _trained(self, run: Callable[[], Any], seed: int = 0) -> Any:
        """Return what `run` returns in training mode; statistics are put back."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.model.train()
        self.gated.train()
        torch.manual_seed(seed)
        result = run()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        self.model.eval()
        self.gated.eval()
        return result


# --- networks and inputs ---------------------------------------------------------------------------------------------------


def _two_samples(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return two samples of the inputs, noise where they are constant."""
    inputs = checked_inputs(model, example_inputs)
    batch = len(inputs[0])
    samples = []
    for x in inputs:
        x = x.double() if x.is_floating_point() else x
        x = torch.cat([x, x])[:2] if len(x) == batch else x
        is_constant = x.is_floating_point() and bool((x == x.flatten()[0]).all())
        samples.append(torch.randn_like(x) if is_constant or (x.is_floating_point() and batch == 1) else x)
    return tuple(samples)


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    """Return the network without constants that hide a part of it: zero heads, scales of 1e-6, fresh statistics."""
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def _random_half(graph: ChannelGraph) -> dict[str, list[int]]:
    """Return half of every group's channels; a fifth of the removable groups keeps none."""
    keep = {}
    for group in graph.groups:
        order = torch.randperm(group.num_channels).tolist()
        is_gone = group.block is not None and float(torch.rand(())) < 0.2
        keep[group.name] = [] if is_gone else sorted(order[: (group.num_channels + 1) // 2])
    return _evenly_averaged(graph, keep)


def _extremes(graph: ChannelGraph) -> dict[str, list[int]]:
    """Return one channel of every other group, and all channels except one of the rest."""
    keep = {}
    for group in graph.groups:
        order = torch.randperm(group.num_channels).tolist()
        keep[group.name] = sorted(order[: 1 if float(torch.rand(())) < 0.5 else max(1, group.num_channels - 1)])
    return keep


def _evenly_averaged(graph: ChannelGraph, keep: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the kept channels with averaged groups of odd width whole, so that the oracle is exact."""
    averaged = averaged_groups(graph)
    is_odd = any(graph.by_name[name].num_channels % 2 for name in averaged)
    return {
        name: list(range(graph.by_name[name].num_channels)) if is_odd and name in averaged and kept else kept
        for name, kept in keep.items()
    }


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Run attention by products that torch can count, and never by a fused transformer layer."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


# --- comparing ----------------------------------------------------------------------------------------------------------------


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_finite(output: Any) -> bool:
    return all(bool(part.isfinite().all()) for part in _tensors(output))


def differs(found: Any, expected: Any) -> str | None:
    """Return how two outputs differ, as the end of a sentence; None if they agree to TOLERANCE."""
    one, other = _tensors(found), _tensors(expected)
    if [x.shape for x in one] != [x.shape for x in other]:
        return f" in shape: {[tuple(x.shape) for x in one]} and {[tuple(x.shape) for x in other]}"
    for a, b in zip(one, other, strict=True):
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) if a.numel() else 0.0
        if not error <= TOLERANCE and not torch.equal(a, b):
            return f" by {error:.1e} of the largest output"
    return None


def _smallest_prefix(items: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> int:
    """Return the smallest n for which the first n items fail, if failing is monotone; found by bisection."""
    low, high = 0, len(items)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(items[:middle]) else (middle, high)
    return high
