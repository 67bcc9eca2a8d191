"""Tracing a network: walk the graph of torch.export, label every channel, and gather the labels into groups."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gator.costs.summary import summarise
from gator.errors import TraceError
from gator.graph.graph import Block, ChannelGraph, GateSite
from gator.graph.plans import ForwardPlan
from gator.graph.selection import Selection
from gator.tracing.blocks import find_blocks
from gator.tracing.counting import count_products, unlabelled_layers
from gator.tracing.forwards import Forwards
from gator.tracing.groups import gather_groups, parts_that_may_be_empty
from gator.tracing.inputs import checked_inputs
from gator.tracing.labels import LabelBook
from gator.tracing.placing import Channels, GatePlacer
from gator.tracing.program import Program, fake_batch
from gator.tracing.recording import record_ops
from gator.tracing.rules import RULES
from gator.tracing.sizes import StatedSizes
from gator.tracing.walk import Walk
from gator.tracing.widths import Widths


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> ChannelGraph:
    """Return the channel groups of a network.

    model: any network that torch.export can trace; it is not run and not changed; its weights do not matter.
    example_inputs: what forward() takes, batch first: (N, 3, H, W). Costs hold for this height and width.
    include, exclude: names of modules ("layer1", which is all that is in it) or glob patterns ("layer*.conv2"). A group may be
    cut when all layers that write it are included and none is excluded; layers that only read it follow. All others are locked.

    Raises: TraceError if torch.export cannot trace the model with these inputs, or a name matches no module.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(group.name, group.num_channels) for group in trace(net, torch.zeros(1, 3, 8, 8)).groups]
    [('0', 8)]
    """
    inputs = checked_inputs(model, example_inputs)
    selection = Selection.of(model, include, exclude)
    program = Program(model, fake_batch(inputs), examples=inputs)
    training = _training_program(model, inputs, program)
    book = LabelBook()
    walk = Walk(program, book, RULES)
    walk.run()
    training_walk = None if training is None else _follow_what_only_trains(training, book)
    forwards = Forwards(program, model, training)
    walk.breaks_zeros.update(forwards.broken_in_training())
    for node, reason in forwards.read_when_broken_in_training():
        walk.lock_value(node, reason)
    while True:
        sizes = StatedSizes(walk, forwards)
        obstacles = list(sizes.obstacles())
        if training_walk is not None:
            obstacles.extend(StatedSizes(training_walk, forwards).obstacles_in_training())
        if not obstacles:
            groups, locked = gather_groups(book, selection)
            channels = Channels(walk, groups)
            obstacles.extend(parts_that_may_be_empty(walk, groups, channels))
        if not obstacles:
            placer = GatePlacer(walk, channels, forwards)
            groups, blocks = find_blocks(walk, groups, forwards, placer, selection)
            sites = placer.place(blocks)
            obstacles = placer.obstacles
        if not obstacles:
            break
        for labels, reason in obstacles:  # those channels stay, and what is tied to them
            book.lock(labels, reason)
    widths = Widths(walk, groups, channels.of_label)
    layers, products, uncounted = count_products(walk, widths, blocks)
    graph = ChannelGraph(
        model=type(model).__name__,
        input_shapes=tuple(tuple(x.shape) for x in inputs),
        input_dtypes=tuple(str(x.dtype).removeprefix("torch.") for x in inputs),
        selection=selection,
        groups=groups,
        locked=(*locked, *unlabelled_layers(walk)),
        blocks=blocks,
        layers=layers,
        products=products,
        uncounted=uncounted,
        sites=sites,
        ops=record_ops(walk, widths, blocks),
        plans=_plans(sizes, blocks, sites, channels),
        parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        text="",
    )
    return replace(graph, text=str(summarise(graph)))


def _training_program(model: nn.Module, inputs: tuple[Tensor, ...], program: Program) -> Program | None:
    """Return the training-mode graph of a network with parts that eval mode does not run, such as auxiliary classifiers.

    They may read pruned channels, and must then be pruned too. Raises: TraceError if the export of that graph fails, because
    then the inputs of those parts are unknown.
    """
    if not program.unused:
        return None
    try:
        return Program(model, fake_batch(inputs), training=True, examples=inputs)
    except TraceError as error:
        raise TraceError(
            f"{', '.join(program.unused[:3])} did not run in eval mode, and training mode, which shows their inputs, fails: "
            f"{error}. Remove these modules (torchvision: aux_logits=False), or give inputs that training mode accepts"
        ) from error


def _follow_what_only_trains(program: Program, book: LabelBook) -> Walk:
    """Extend the labels of the eval-mode walk to layers that run in training mode only; lock their own channels."""
    begin = book.num_labels
    walk = Walk(program, book, RULES)
    walk.run()
    own = torch.arange(begin, book.num_labels)
    roots = book.roots()[begin:]  # the smallest label of each component
    book.lock(own[roots >= begin], "in a layer that runs in training mode only")
    return walk


def _plans(
    sizes: StatedSizes, blocks: tuple[Block, ...], sites: tuple[GateSite, ...], channels: Channels
) -> dict[str, ForwardPlan]:
    """Return the plans of the modules whose forward pass may have to be regenerated."""
    inside = (site.module for site in sites if site.step is not None)
    paths = dict.fromkeys([*sizes.modules(), *(block.container for block in blocks), *inside])
    return {path: sizes.plan(path, channels.of) for path in paths}
