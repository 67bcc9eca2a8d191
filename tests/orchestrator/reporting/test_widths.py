import csv

import torch

import gator
from gator.costs.summary import widths_csv
from orchestrator.models.cifar_resnet import CifarResNet


def test_table_tells_every_group_and_which_block_went() -> None:
    network = CifarResNet(num_classes=10, blocks_per_stage=1, width=4)
    graph = gator.trace(network, torch.zeros(1, 3, 32, 32))
    inner = next(group for group in graph.groups if group.block is not None)
    keep = {group.name: range(group.num_channels) for group in graph.groups}
    architecture = gator.Architecture.from_keep(graph, {**keep, graph.groups[0].name: (0, 2), inner.name: ()})
    lines = list(csv.DictReader(widths_csv(graph, architecture).splitlines()))
    assert [line["group"] for line in lines] == [group.name for group in graph.groups]
    by_name = {line["group"]: line for line in lines}
    assert by_name[graph.groups[0].name]["after"] == "2"
    assert (by_name[inner.name]["after"], by_name[inner.name]["removed_block"]) == ("0", inner.block)
    assert [line["group"] for line in lines if line["removed_block"]] == [inner.name]
    assert all(0 < float(line["macs_share"]) < 1 for line in lines)
