"""The widths of a pruned network as a table that a person sorts: where channels went, and what they cost."""

import csv
import io

import gator
from gator.summary import CostSummary


def widths_csv(graph: gator.ChannelGraph, architecture: gator.Architecture) -> str:
    """Return a CSV with a line per channel group, in the order of the network.

    before, after: channels. macs_share, params_share: of the unpruned network, what is gone when this group alone is at one
    channel; a layer between two groups counts for both. removed_block: the residual block that went with the group.
    """
    macs, params = CostSummary.of(gator.MacsCost(graph)), CostSummary.of(gator.ParamsCost(graph))
    gone = set(architecture.removed_blocks)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "before", "after", "macs_share", "params_share", "removed_block"])
    for group, macs_alone, params_alone in zip(graph.groups, macs.per_group, params.per_group, strict=True):
        after = len(architecture.keep[group.name])
        shares = (f"{macs_alone / macs.full:.4f}", f"{params_alone / params.full:.4f}")
        block = group.block if group.block in gone else ""
        writer.writerow([group.name, group.num_channels, after, *shares, block])
    return text.getvalue()
