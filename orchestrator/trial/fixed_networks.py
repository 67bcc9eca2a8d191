"""Networks of others that a space names, measured beside the trials: on the same images and the same device, not trained.

With weights their accuracy is taken too; one that is given by its widths alone is cut to them and timed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

import gator
from orchestrator.cluster.processes import in_own_process, measuring_device
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.messages import shown
from orchestrator.config.metrics import FINISHED, REFERENCE, UNPRUNED
from orchestrator.config.search import ReferenceConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.config.yaml_files import PROJECT_ROOT
from orchestrator.datasets import splits as datasets
from orchestrator.errors import ConfigError
from orchestrator.latency.curve import Curve, take_curve
from orchestrator.latency.sources import make_source, measure_latencies
from orchestrator.models import networks as models_networks
from orchestrator.models import saved as models_saved
from orchestrator.models.networks import build_traced
from orchestrator.storage.files import read_json
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.evaluation import evaluate
from orchestrator.training.ranks import Ranks


def measure_reference(reference: ReferenceConfig, base: TrialConfig, cluster: ClusterConfig) -> EpochMetrics:
    """Return the row of results.parquet of a network. Call it while nothing trains.

    base: the config of the trials it stands beside.    Raises: ConfigError if its widths do not fit it, DataError if its
    weights or the images cannot be read.
    """
    return in_own_process(
        _measure,
        reference.model_dump_json(),
        base.model_dump_json(),
        measuring_device(cluster),
        profile=base.profile,
        cluster=cluster,
        num_gpus=cluster.gpus_to_measure,
    )


def build_untrained(reference: ReferenceConfig, image_size: int) -> tuple[nn.Module, gator.Architecture]:
    """Return the network, cut to its widths if it has any, with random weights: they do not matter to the time."""
    network, graph, architecture = _build(reference, image_size)
    return gator.prune(network, graph, architecture), architecture


def architecture_of(graph: gator.ChannelGraph, file: str) -> gator.Architecture:
    """Return the architecture that keeps as many channels as a JSON file says, the first ones of each group.

    Raises: ConfigError if the file is absent, names no convolution of the network, or gives two layers that share their
    channels different numbers of them.
    """
    channels = _read_channels(file)
    keep, named = {}, set()
    for group in graph.groups:
        writers = {layer for layer, side in group.layers if side == "out"}
        # a shortcut is a container of its convolution and its normalisation: downsample stands for downsample.0
        names = {name for name in channels if name in writers or f"{name}.0" in writers}
        numbers = {channels[name] for name in names}
        if len(numbers) > 1 or not all(1 <= number <= group.num_channels for number in numbers):
            raise ConfigError(
                f"widths {file}: {', '.join(sorted(names))} share {group.num_channels} channels, found {sorted(numbers)} for them, "
                "expected one number of at most so many"
            )
        named |= names
        keep[group.name] = range(numbers.pop() if numbers else group.num_channels)
    if unknown := sorted(channels.keys() - named):
        raise ConfigError(f"widths {file}: {', '.join(unknown)} is no layer of the network whose channels can be cut")
    return gator.Architecture.from_keep(graph, keep)


def _read_channels(file: str) -> dict[str, int]:
    path = Path(file) if Path(file).is_file() else PROJECT_ROOT / file
    content = read_json(path, ConfigError, "expected JSON with the key channels")
    try:
        return dict(_leaves(content.get("channels")))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"widths {file}: channels: {error}") from error


def _leaves(tree: object, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the numbers of a tree of mappings by their dotted names. Raises: ValueError for anything else in it."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}".removeprefix("."))
    elif name and isinstance(tree, int) and not isinstance(tree, bool):
        yield name, tree
    else:
        raise ValueError(
            f"found {shown(tree)} {f'for {name}' if name else 'on top'}, expected numbers of channels by layer"
        )


def _build(reference: ReferenceConfig, image_size: int) -> tuple[nn.Module, gator.ChannelGraph, gator.Architecture]:
    network, graph = build_traced(reference.model, (3, image_size, image_size))
    if reference.widths is None:
        return network, graph, gator.Architecture.full(graph)
    return network, graph, architecture_of(graph, reference.widths)


def _measure(reference_json: str, base_json: str, device_name: str) -> EpochMetrics:
    reference, base = ReferenceConfig.model_validate_json(reference_json), TrialConfig.model_validate_json(base_json)
    device, size = torch.device(device_name), base.data.image_size
    network, graph, architecture = _build(reference, size)
    network = (
        models_networks.build(reference.model)
        if reference.widths is None
        else gator.prune(network, graph, architecture)
    ).to(device)
    accuracy: EpochMetrics = {}
    if reference.model.weights is not None:
        images = datasets.load(base.data, base.seed).val
        accuracy = evaluate(network, images, base, Ranks(device=device))
    macs = gator.MacsCost(graph)
    clock = make_source(base, (3, size, size), macs, device, curve=None)
    return {
        "trial_id": reference.name,
        "kind": REFERENCE,
        "status": FINISHED,
        **accuracy,
        **measure_latencies(clock, network.eval(), architecture, base.profile),
        "macs": round(macs(architecture)),
        "macs_ratio": macs(architecture) / models_networks.count_macs(base.model, size),
        "params": round(gator.ParamsCost(graph)(architecture)),
    }


def measure_unpruned(
    config: TrialConfig, base_weights: Path, cluster: ClusterConfig
) -> tuple[EpochMetrics, Curve | None]:
    """Return the row of results.parquet of the unpruned network, and the curve that trials estimate from which are measured apart.

    base_weights: from ensure_base. Call it while nothing trains.
    """
    row, curve_json = in_own_process(
        _measure_unpruned,
        config.model_dump_json(),
        str(base_weights.resolve()),
        measuring_device(cluster),
        cluster.measures_apart,
        profile=config.profile,
        cluster=cluster,
        num_gpus=cluster.gpus_to_measure,
    )
    return row, None if curve_json is None else Curve.from_json(curve_json)


def _measure_unpruned(
    config_json: str, base_weights: str, device_name: str, measures_apart: bool
) -> tuple[EpochMetrics, str | None]:
    config, device = TrialConfig.model_validate_json(config_json), torch.device(device_name)
    splits = datasets.load(config.data, config.seed)
    network, graph = build_traced(config.model, splits.input_shape)
    models_saved.load_base(network, Path(base_weights))
    network.to(device)
    macs, full = gator.MacsCost(graph), gator.Architecture.full(graph)
    accuracy = evaluate(network, splits.val, config, Ranks(device=device))
    clock = make_source(config, splits.input_shape, macs, device, curve=None)
    row = {
        "trial_id": UNPRUNED,
        "kind": UNPRUNED,
        "status": FINISHED,
        **accuracy,
        **measure_latencies(clock, network, full, config.profile),
        "macs": round(macs.full),
        "macs_ratio": 1.0,
        "params": round(gator.ParamsCost(graph).full),
    }
    if config.profile.clock == "model" or not measures_apart:
        return row, None
    return row, take_curve(network, graph, config.profile).to_json()
