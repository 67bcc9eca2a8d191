"""Verifying a traced network: cuts random architectures, and compares the networks that come out with one another and with an oracle."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from gator.checking.comparing import (
    TOLERANCE,
    TOLERANCE_OF_FLOAT32,
    differs,
    first_parting,
    infinite_op,
    is_finite,
    rounds_inside,
    tensors_of,
)
from gator.checking.oracle import averaged_groups, silenced
from gator.costs.counted import ParamsCost
from gator.errors import GatorError, PruneError, VerificationError
from gator.gating.check import check_macs
from gator.gating.gated import GatedModel
from gator.gating.gates import GateConfig
from gator.graph.architecture import Architecture
from gator.graph.graph import Block, ChannelGraph
from gator.pruning.modules import copied
from gator.pruning.prune import prune
from gator.tracing.inputs import checked_inputs

_SMALL = 64
"""Pixels of an image that most networks take, and still see as more than one position after their last stage."""

_CHEAP = 20_000
"""Numbers in two samples up to which it is faster to compute than to follow shapes."""

_DRAWS = 12
"""Seeds of a training step that are compared, where its outputs might not depend on the seed."""


def verify(model: nn.Module, graph: ChannelGraph, example_inputs: Tensor | Sequence[Tensor], seed: int = 0) -> None:
    """Check that gator prunes, gates and counts this network exactly. `model` does not change.

    Two random architectures are cut in float64: groups of half the channels, of one, and of all except one; each removable block is gone
    in one of the two. Then the pruned network, the gated one and an oracle (gator/checking/oracle.py) agree in eval mode, pruned and
    gated agree in training mode, and the costs are those that torch counts. With all gates open the gated network is `model` in training
    mode. No sample depends on the mask of another one, and the gradients of a training step are finite.

    example_inputs: as for trace(). Noise replaces constant ones, and weights that are all equal: only the structure is checked.
    Images of 64 pixels replace larger ones if the network agrees on those; costs are counted for the given size, without computing.

    A network that computes some values in float32 whatever its type is compared in float32, if it was traced so.

    Takes as long as 14 to 20 forward passes of one sample in float64, and memory for four copies of the network in float64.
    Raises: VerificationError, which names the channel group and the first module where the values part.

    >>> import gator
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> verify(net, gator.trace(net, torch.zeros(1, 3, 8, 8)), torch.zeros(1, 3, 8, 8))
    """
    if not graph.groups:
        return
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(cuda), _countable_attention():
        torch.manual_seed(seed)
        inputs, live = _two_samples(model, example_inputs), _lively(copied(model).double())
        may_be_single = "float64" not in graph.input_dtypes
        rounds = _rounds_inside(live, tuple(x[:1] if len(x) == 2 else x for x in inputs))
        if not (rounds and may_be_single):
            try:
                _check(_Subject(live, graph, inputs, rounds))
                return
            except GatorError:
                raise
            except Exception as error:  # such as a type in which the network was not traced
                if not may_be_single:
                    raise _failed(model, graph, example_inputs, error) from error
        inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
        try:
            with torch.backends.mkldnn.flags(enabled=False):  # its LSTM of one input in float32 ends the process
                _check(_Subject(_lively(copied(model).float()), graph, inputs, rounds=True))
        except GatorError:
            raise
        except Exception as error:
            raise _failed(model, graph, example_inputs, error) from error


def _failed(
    model: nn.Module, graph: ChannelGraph, example_inputs: Tensor | Sequence[Tensor], error: Exception
) -> VerificationError:
    inputs = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    try:
        with torch.inference_mode():
            copied(model).eval()(*inputs)
    except Exception as own:  # whatever the network raises
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
        return VerificationError(
            f"{graph.model} itself does not run on the example inputs, {shapes}: {_first_words(own)}; give inputs that it takes, as for "
            "trace()"
        )
    return VerificationError(
        f"{graph.model}: the check of its pruning ended in {_first_words(error)}. Either the network does not run in training "
        "mode, or gator prunes it wrongly; then please report it"
    )


def _first_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _check(subject: "_Subject") -> None:
    """Run all checks, with small images or one sample in training where the network passes them."""
    small = tuple(map(_small, subject.inputs))
    is_smaller = any(one is not other for one, other in zip(small, subject.inputs, strict=True))
    needs_two = any(op.kind.name == "batch_norm" for op in subject.graph.ops)
    if (is_smaller and subject.agrees_on(small, num_trained=2)) or (
        not needs_two and subject.agrees_on(subject.inputs, num_trained=1)
    ):
        return
    _check_all(subject)


def _check_all(subject: "_Subject") -> None:
    try:
        for number, keep in enumerate(subject.without_blocks):
            subject.check_eval_mode(number, *subject.cut(keep))
        subject.check_samples()
        subject.check_training_mode(*subject.cut(subject.half))
    except VerificationError:
        subject.check_finite()  # what is not finite explains all that follows from it
        raise


class _Subject:
    """A network under test, in the type of its inputs."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, inputs: tuple[Tensor, ...], rounds: bool = False) -> None:
        """inputs: two samples, of the size for which the graph counts costs. rounds: it computes some values in float32 anyway."""
        self.model, self.graph, self.inputs, self.counted_inputs = model.eval(), graph, inputs, inputs
        self.num_trained = 2
        """Samples of a training step."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
        self.gated = GatedModel(model, graph, GateConfig(init_keep_prob=0.6)).to(dtype).eval()
        self.rounding = 4 * torch.finfo(dtype).eps
        self.differs = partial(differs, tolerance=TOLERANCE_OF_FLOAT32 if rounds else TOLERANCE)
        # Drawn once: what fails with a part of the inputs is checked again, not another cut.
        self.half, self.extremes = _random_half(graph), _extremes(graph)
        blocks = [graph.blocks[number] for number in torch.randperm(len(graph.blocks)).tolist()]
        self.without_blocks = _without(blocks[::2], self.half), _without(blocks[1::2], self.extremes)

    def agrees_on(self, inputs: tuple[Tensor, ...], num_trained: int) -> bool:
        """Whether all checks pass with these inputs, of which so many train. What fails may be due to their size alone."""
        self.inputs, self.num_trained = inputs, num_trained
        try:
            _check_all(self)
        except Exception:  # such as a view that states the size of an image
            self.inputs, self.num_trained = self.counted_inputs, 2
            self.gated.load_architecture(Architecture.full(self.graph))
            return False
        return True

    @torch.no_grad()
    def check_finite(self) -> None:
        """Check that there are outputs to compare."""
        if not is_finite(self.model(*self.inputs)):
            self._fail(
                "its outputs are not finite, so nothing can be compared; give example inputs as in training, not constants"
            )

    def cut(self, keep: dict[str, list[int]]) -> tuple[Architecture, nn.Module]:
        """Return an architecture and the network cut to it."""
        architecture = Architecture.from_keep(self.graph, keep)
        return architecture, prune(self.model, self.graph, architecture)

    def check_eval_mode(self, number: int, architecture: Architecture, pruned: nn.Module) -> None:
        """Check the outputs of an architecture for one of the samples, and its costs."""
        if (found := self._difference(architecture, number, pruned)) is not None:
            self._fail(self._where(architecture, partial(self._difference, number=number), *found))
        self._check_costs(architecture, pruned)

    @torch.no_grad()
    def check_training_mode(self, architecture: Architecture, pruned: nn.Module) -> None:
        """Check training mode: the same output when all is open, that of the pruned network under masks, and finite gradients."""
        self.gated.load_architecture(Architecture.full(self.graph))
        all_open = torch.ones(self.num_trained, self.graph.num_channels, dtype=torch.float64)
        text = self.differs(
            self._train(self.gated, lambda: self._masked(all_open, self._trained())), self._train(self.model)
        )
        if text is not None and not self._is_undetermined(self.model):
            self._fail(f"in training mode the gated network with all gates open and the network differ{text}")
        found = self._training_difference(architecture, pruned)
        if found is not None and not self._is_undetermined(pruned):
            self._fail(self._where(architecture, self._training_difference, *found))
        with torch.enable_grad():
            if self._not_finite(self.model) is None:
                self._check_gradients_are_finite()

    def _check_gradients_are_finite(self) -> None:
        """Check the gradients under random masks: some that leave a channel of each group, and some that need not."""
        mask_NC = (torch.rand(self.num_trained, self.graph.num_channels) < 0.6).to(self.gated.gates.logits_C)
        for begin in self.graph.offsets.values():
            mask_NC[:, begin] = 1
        if (name := self._not_finite(self.gated, mask_NC.requires_grad_())) is not None:
            op = infinite_op(lambda: self._train(self.model))
            cause = "" if op is None else f": {op} returns infinite values, through which gates cannot be trained"
            self._fail(f"the gradient of {name} is not finite under random masks, though it is without them{cause}")
        if (name := self._not_finite(self.gated)) is not None:
            self._fail(
                f"the gradient of {name} is not finite under masks that close all channels of a group: the network divides by what is "
                f"zero then, so gates cannot be trained. Add a small number to what it divides by, or exclude the group"
            )

    def _fail(self, text: str) -> NoReturn:
        raise VerificationError(f"{self.graph.model}: {text}")

    # --- outputs --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _difference(
        self, architecture: Architecture, number: int, pruned: nn.Module | None = None
    ) -> tuple[str, nn.Module, nn.Module] | None:
        """Return how the pruned network differs from a reference for one of the samples, and both; None if it agrees with all."""
        pruned, inputs = pruned or prune(self.model, self.graph, architecture), self._sample(number)
        output = pruned(*inputs)
        self.gated.load_architecture(architecture)
        if (text := self.differs(output, self.gated(*inputs))) is not None and not self._is_noise(pruned, inputs):
            return f"the pruned and the gated network differ{text}", pruned, self.gated
        oracle = silenced(self.model, self.graph, architecture)
        expected = None if oracle is None else oracle(*inputs)
        text = None if oracle is None or not is_finite(expected) else self.differs(output, expected)
        if oracle is not None and text is not None and not self._is_noise(pruned, inputs):
            return f"the pruned network and the unpruned one without the closed channels differ{text}", pruned, oracle
        return None

    @torch.no_grad()
    def _training_difference(
        self, architecture: Architecture, pruned: nn.Module | None = None
    ) -> tuple[str, nn.Module, nn.Module] | None:
        """Return how the pruned and the gated network differ in training mode, and both; None if they agree."""
        pruned = pruned or prune(self.model, self.graph, architecture)
        self.gated.load_architecture(architecture)
        mask_NC = self.graph.mask_of(architecture.keep).double().expand(self.num_trained, -1)
        text = self.differs(
            self._train(pruned), self._train(self.gated, lambda: self._masked(mask_NC, self._trained()))
        )
        if text is None:
            return None
        return f"in training mode the pruned and the gated network differ{text}", pruned, self.gated

    def _trained(self) -> tuple[Tensor, ...]:
        """Return the inputs of a training step."""
        return self.inputs if self.num_trained == 2 else self._sample(0)

    def _sample(self, number: int) -> tuple[Tensor, ...]:
        """Return the inputs of one of the two samples."""
        size = len(self.inputs[0])
        return tuple(x[number : number + 1] if len(x) == size else x for x in self.inputs)

    def _where(
        self,
        architecture: Architecture,
        difference_of: Callable[[Architecture], tuple[str, nn.Module, nn.Module] | None],
        text: str,
        pruned: nn.Module,
        reference: nn.Module,
    ) -> str:
        """Return the message about a difference, with the group that makes it."""
        cut = [name for name, kept in architecture.keep.items() if len(kept) < architecture.num_channels[name]]

        def difference(names: Sequence[str]) -> tuple[str, nn.Module, nn.Module] | None:
            """Return the difference that is left when only these groups are cut."""
            only = Architecture.from_keep(self.graph, {name: architecture.keep[name] for name in names})
            return difference_of(only)

        number = _smallest_prefix(cut, lambda names: difference(names) is not None)
        culprit, rest = cut[number - 1], ""
        if (found := difference([culprit])) is None:
            found, rest = difference(cut[:number]), " and of groups before it"
        text, pruned, reference = found or (text, pruned, reference)
        place = first_parting(pruned, reference, self.inputs)
        return (
            f"when channels of group {culprit!r}{rest} are removed, {text}{place}. gator prunes this network wrongly, please report it; "
            f"exclude=[{culprit.partition('#')[0]!r}] leaves these channels"
        )

    def _check_costs(self, architecture: Architecture, pruned: nn.Module) -> None:
        inputs = self.counted_inputs
        if inputs[0].numel() > _CHEAP:
            inputs = tuple(map(FakeTensorMode(allow_non_fake_inputs=True).from_tensor, inputs))
        try:
            check_macs(pruned, self.graph, architecture, *inputs)
        except PruneError as error:
            self._fail(str(error))
        num_params, said = sum(p.numel() for p in pruned.parameters()), ParamsCost(self.graph)(architecture)
        if num_params != said:
            self._fail(f"ParamsCost says {said:,.0f} parameters, the pruned network has {num_params:,}")

    # --- the gated network ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_samples(self) -> None:
        """Check that a sample's output does not change with the mask of another sample."""
        mask_C, other_C = (self.graph.mask_of(keep).double() for keep in (self.half, self.extremes))
        self.gated.load_architecture(Architecture.from_keep(self.graph, self.half))
        mixed = self._masked(torch.stack([mask_C, other_C]), self.inputs)
        if self.differs(_firsts(mixed), self.gated(*self._sample(0))) is None:
            return
        alike = self._masked(torch.stack([mask_C, mask_C]), self.inputs)
        if (text := self.differs(_firsts(mixed), _firsts(alike))) is not None:
            self._fail(f"the output of a sample changes with the mask of another sample{text}")

    def _masked(self, mask_NC: Tensor, inputs: tuple[Tensor, ...]) -> Any:
        """Return the gated network's output under given masks."""
        return self.gated.under(mask_NC.to(self.gated.gates.logits_C), *inputs)

    def _is_undetermined(self, network: nn.Module) -> bool:
        """Whether a network's outputs in training mode cannot be compared, because it draws numbers, or rounding alone changes them.

        Several draws, since those of a dropout over few values may agree by chance. Rounding: a deep network on small images leaves
        two values to its last batch normalisations, which amplify it.
        """
        nudged = self._nudged(self._trained())
        with torch.no_grad():
            first = self._train(network)
            if self.differs(first, self._train(network, lambda: network(*nudged))) is not None:
                return True
            return any(self.differs(first, self._train(network, seed=seed)) is not None for seed in range(1, _DRAWS))

    def _is_noise(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
        """Whether rounding alone changes the outputs in eval mode, such as a mean of what has been centred, once its branches are gone."""
        return self.differs(network(*inputs), network(*self._nudged(inputs))) is not None

    def _nudged(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return inputs that differ by rounding."""
        return [x * (1 + self.rounding * torch.randn_like(x)) if x.is_floating_point() else x for x in inputs]

    def _not_finite(self, network: nn.Module, mask_NC: Tensor | None = None) -> str | None:
        """Return the name of a parameter, or the gates, whose gradient in a training step is not finite. mask_NC: instead of a draw."""

        def step() -> None:
            """Run forward and backward."""
            output = network(*self._trained()) if mask_NC is None else self._masked(mask_NC, self._trained())
            losses = [part.square().mean() for part in tensors_of(output) if part.requires_grad]
            torch.stack(losses).sum().backward()

        self.gated.zero_grad()
        self._train(network, step)
        gates = self.gated.gates.logits_C if mask_NC is None else mask_NC
        named = [("the gates", gates), *self.model.named_parameters()]
        return next((name for name, p in named if p.grad is not None and not is_finite(p.grad)), None)

    def _train(self, network: nn.Module, run: Callable[[], Any] | None = None, seed: int = 0) -> Any:
        """Return what `run` returns, by default the network's output, in training mode; statistics are put back."""
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        network.train()
        torch.manual_seed(seed)
        try:
            return network(*self._trained()) if run is None else run()
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            network.eval()


# --- networks, inputs and architectures ---------------------------------------------------------------------------------------


def _two_samples(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return two samples of the inputs; noise where they are constant, or where there is one sample only."""
    inputs = checked_inputs(model, example_inputs)
    batch = len(inputs[0])
    samples = []
    for x in inputs:
        two = torch.cat([x, x])[:2] if len(x) == batch else x
        is_constant = bool((x == x.flatten()[0]).all())
        is_noise = two.is_floating_point() and (is_constant or batch == 1)
        samples.append(torch.randn_like(two, dtype=torch.float64) if is_noise else _as_double(two))
    return tuple(samples)


def _rounds_inside(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a network of float64 computes some values in fewer bits, or does not run in float64 since it does."""
    try:
        return rounds_inside(model, inputs)
    except Exception:  # such as a layer that gets another type than its own; the checks report what else it is
        return True


def _firsts(output: Any) -> list[Tensor]:
    """Return what an output of two samples holds of the first."""
    return [part[:1] for part in tensors_of(output) if part.dim() and len(part) == 2]


def _small(x: Tensor) -> Tensor:
    """Return a part of images of 64 pixels; of anything else, all of it."""
    return x[..., :_SMALL, :_SMALL] if x.dim() == 4 and min(x.shape[-2:]) >= 2 * _SMALL else x


def _as_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


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
    """Return half of every group's channels.

    Groups that are averaged stay whole if the width of one of them is odd: the oracle is exact for even ones.
    """
    averaged = averaged_groups(graph)
    stays = averaged if any(graph.by_name[name].num_channels % 2 for name in averaged) else set()
    keep = {}
    for group in graph.groups:
        order = torch.randperm(group.num_channels).tolist()
        num_kept = group.num_channels if group.name in stays else (group.num_channels + 1) // 2
        keep[group.name] = sorted(order[:num_kept])
    return keep


def _extremes(graph: ChannelGraph) -> dict[str, list[int]]:
    """Return one channel of half of the groups, and all except one of the rest."""
    keep = {}
    for group in graph.groups:
        order = torch.randperm(group.num_channels).tolist()
        num_kept = 1 if float(torch.rand(())) < 0.5 else max(1, group.num_channels - 1)
        keep[group.name] = sorted(order[:num_kept])
    return keep


def _without(blocks: Sequence[Block], keep: dict[str, list[int]]) -> dict[str, list[int]]:
    return keep | {name: [] for block in blocks for name in block.groups}


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Run attention as products that torch can count, and never as a fused transformer layer."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _smallest_prefix(items: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> int:
    """Return the smallest n for which the first n items fail, found by bisection."""
    low, high = 0, len(items)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(items[:middle]) else (middle, high)
    return high
