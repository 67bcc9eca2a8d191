"""Rules for layers, which sum over the channels they read and write new ones; and for normalisations."""

import torch
from torch.fx import Node

from gator.graph.ops import cuts_whole_groups
from gator.tracing.labels import spread, varying_dims
from gator.tracing.rules.table import rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten


@rule(
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    zeros=Zeros.BROKEN,
)
def convolution(walk: Walk, node: Node) -> Labels:
    """Follow a convolution; a grouped one keeps whole groups, or the same channels in each, whichever is finer."""
    args = walk.arguments(node)
    weight, num_groups, num_out = args["weight"], args["groups"], walk.shape(node)[1]
    read = walk.channels(args["input"], 1, node)
    if num_groups < len(read):  # a depthwise convolution does not sum over channels
        walk.reads.append(args["input"])
    if num_groups == 1:
        out = walk.weight(weight, 0, walk.fresh(num_out), "out")
        walk.weight(weight, 1, read, "in")
    elif cuts_whole_groups(len(read), num_groups):
        whole = walk.tie_columns(read.view(num_groups, -1))
        out = walk.weight(weight, 0, whole.repeat_interleave(num_out // num_groups), "out", "in")
    else:
        walk.weight(weight, 1, walk.tie_rows(read.view(num_groups, -1)), "in")
        out = walk.tie_rows(walk.fresh(num_out).view(num_groups, -1))
        out = walk.weight(weight, 0, out.repeat(num_groups), "out")
    walk.bind(args["bias"], 0, out)
    return spread(out, 1, walk.shape(node))


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, zeros=Zeros.BROKEN)
def transposed_convolution(walk: Walk, node: Node) -> Labels:
    """Follow a transposed convolution, whose weight is (in, out / groups, kernel...)."""
    args = walk.arguments(node)
    weight, num_groups, num_out = args["weight"], args["groups"], walk.shape(node)[1]
    read = walk.channels(args["input"], 1, node)
    walk.reads.append(args["input"])
    if num_groups > 1 and cuts_whole_groups(len(read), num_groups):
        whole = walk.tie_columns(read.view(num_groups, -1))
        walk.weight(weight, 0, whole.repeat_interleave(len(read) // num_groups), "out", "in")
        out = whole.repeat_interleave(num_out // num_groups)
    else:
        walk.weight(weight, 0, walk.tie_rows(read.view(num_groups, -1)).repeat(num_groups), "in")
        out = walk.tie_rows(walk.fresh(num_out).view(num_groups, -1))
        out = walk.weight(weight, 1, out, "out").repeat(num_groups)
    walk.bind(args["bias"], 0, out)
    return spread(out, 1, walk.shape(node))


@rule(aten.linear.default, zeros=Zeros.BROKEN)
def linear(walk: Walk, node: Node) -> Labels:
    """Follow a linear layer on the last dimension."""
    args = walk.arguments(node)
    num_out = walk.shape(node)[-1]
    walk.reads.append(args["input"])
    walk.weight(args["weight"], 1, walk.channels(args["input"], -1, node), "in")
    out = walk.weight(args["weight"], 0, walk.fresh(num_out), "out")
    walk.bind(args["bias"], 0, out)
    return spread(out, -1, walk.shape(node))


@rule(aten.batch_norm.default, aten.instance_norm.default, zeros=Zeros.BROKEN)
def batch_norm(walk: Walk, node: Node) -> Labels:
    """Follow batch or instance normalisation: parameters and statistics run along dimension 1."""
    args = walk.arguments(node)
    read = walk.channels(args["input"], 1, node)
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.bind(args[name], 0, read)
    return spread(read, 1, walk.shape(node))


@rule(aten.group_norm.default, zeros=Zeros.BROKEN)
def group_norm(walk: Walk, node: Node) -> Labels:
    """Follow group normalisation, pruned by whole norm groups. A single one takes its mean and variance over the open channels only."""
    args = walk.arguments(node)
    read = walk.channels(args["input"], 1, node)
    if args["num_groups"] == 1:
        walk.normalisations.append(node)
        for name in ("weight", "bias"):
            walk.bind(args[name], 0, read)
        return spread(read, 1, walk.shape(node))
    if args["weight"] is None:
        walk.lock(read, f"{walk.describe(node)} has no weights, so no tensor shows how many norm groups remain")
        return spread(read, 1, walk.shape(node))
    whole = walk.tie_columns(read.view(args["num_groups"], -1)).repeat_interleave(len(read) // args["num_groups"])
    for name in ("weight", "bias"):
        walk.bind(args[name], 0, whole)
    return spread(whole, 1, walk.shape(node))


@rule(aten.layer_norm.default, aten.rms_norm.default, zeros=Zeros.BROKEN)
def layer_norm(walk: Walk, node: Node) -> Labels:
    """Follow layer or RMS normalisation. Over channels it takes its mean and variance over the open ones only."""
    args = walk.arguments(node)
    labels, num_dims = walk.labels(args["input"]), len(args["normalized_shape"])
    if labels is None:
        return None
    normalised = {dim for dim in varying_dims(labels) if dim >= labels.dim() - num_dims}
    if not normalised:
        return labels
    if normalised != set(varying_dims(labels)):  # the features of a head, of which other dimensions hold several
        return walk.tie_along(labels, normalised)
    if num_dims > 1:
        walk.lock(labels, f"{walk.describe(node)} normalises over channels and positions together")
        return None
    read = walk.channels(args["input"], -1, node)
    for name in ("weight", "bias"):
        walk.bind(args.get(name), 0, read)
    walk.normalisations.append(node)
    return spread(read, -1, walk.shape(node))


@rule(aten._weight_norm.default, zeros=Zeros.KEPT)
def weight_norm(walk: Walk, node: Node) -> Labels:
    """Follow a weight scaled to a norm along one dimension. Each norm is over all entries of the other dimensions, which stay."""
    labels = walk.together(node)
    if labels is not None and set(varying_dims(labels)) != {walk.arguments(node)["dim"] % labels.dim()}:
        walk.lock(labels, f"{walk.describe(node)} is computed from all entries of a parameter, those that are cut too")
        return None
    return labels


@rule(aten.embedding.default, zeros=Zeros.BROKEN)
def embedding(walk: Walk, node: Node) -> Labels:
    """Follow a table of embeddings: the rows stay, the columns are channels."""
    weight = node.args[0]
    walk.lock(walk.labels(node.args[1]), f"{walk.describe(node)} picks rows by values")
    out = walk.weight(weight, 1, walk.fresh(walk.shape(node)[-1]), "out")  # type: ignore[arg-type]
    return spread(out, -1, walk.shape(node))


@rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, zeros=Zeros.BROKEN)
def recurrence(walk: Walk, node: Node) -> Labels:
    """Follow a recurrent layer, which reads channels in both directions; its own state stays whole."""
    args = walk.arguments(node)
    weights, num_directions = args["params"], 1 + args["bidirectional"]
    read = walk.channels(args["input"], -1, node)
    walk.reads.append(args["input"])
    for direction in range(num_directions):
        walk.weight(weights[direction * len(weights) // (args["num_layers"] * num_directions)], 1, read, "in")
    return [None] * len(node.meta["val"])
