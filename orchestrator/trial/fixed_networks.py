"""Networks that are measured and not trained: the unpruned one, and the references that a space names.

They get the images and the device of the trials. Accuracy needs weights; a network that is given by its widths alone is pruned to
them and timed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

import gator
from orchestrator.cluster.processes import in_own_process, measuring_device
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.messages import shown
from orchestrator.config.metrics import FINISHED, REFERENCE, TEST, UNPRUNED
from orchestrator.config.trial import ModelConfig, ProfileConfig, TrialConfig
from orchestrator.config.yaml_files import SHIPPED
from orchestrator.datasets import splits as datasets
from orchestrator.errors import ConfigError
from orchestrator.latency.curve import Curve, take_curve
from orchestrator.latency.sources import make_source, measure_latencies
from orchestrator.models.networks import build, build_traced
from orchestrator.models.saved import load_base
from orchestrator.storage.addresses import parted
from orchestrator.storage.fetching import fetched
from orchestrator.storage.files import read_json, write_atomic
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.evaluation import evaluate
from orchestrator.training.ranks import Ranks
from orchestrator.trial.costs import size_metrics


def measure_fixed(
    name: str,
    model: ModelConfig,
    base: TrialConfig,
    cluster: ClusterConfig,
    *,
    widths: str | None = None,
    base_weights: str | Path | None = None,
    curve_file: Path | None = None,
) -> EpochMetrics:
    """Return the row of results.parquet of a network, measured in a process of its own. Call it while nothing trains.

    base: the config of the trials that it is compared with.    widths: see architecture_of.    base_weights: from ensure_base; where every
    node finds them, a path or an address.
    curve_file: where its latency curve is written, if networks are timed apart from their trials.
    Raises: ConfigError if its widths do not fit it, DataError if its weights or the images cannot be read.
    """
    row, curve = in_own_process(
        _measure_fixed,
        name,
        model.model_dump_json(),
        base.model_dump_json(),
        widths,
        None if base_weights is None else str(base_weights),
        measuring_device(cluster),
        curve_file is not None and cluster.measures_apart and base.profile.clock == "wall",
        profile=base.profile,
        cluster=cluster,
        num_gpus=cluster.gpus_to_measure,
    )
    if curve_file is not None and curve is not None:
        write_atomic(curve_file, curve)
    return row


def _measure_fixed(
    name: str,
    model_json: str,
    base_json: str,
    widths: str | None,
    base_weights: str | None,
    device_name: str,
    takes_curve: bool,
) -> tuple[EpochMetrics, str | None]:
    """Return the row, and the curve as JSON."""
    model, base = ModelConfig.model_validate_json(model_json), TrialConfig.model_validate_json(base_json)
    device, size = torch.device(device_name), base.data.image_size
    network, graph, architecture = build_fixed(model, widths, size)
    accuracy: EpochMetrics = {}
    if base_weights is not None:
        folder, file = parted(base_weights)
        with fetched(folder, file) as found:
            load_base(network, found / file)
    elif model.weights is not None:
        network = build(model)
    network.to(device)
    if base_weights is not None or model.weights is not None:
        test = datasets.load(base.data, base.seed).test
        accuracy = {**evaluate(network, test, base, Ranks(device=device)), "accuracy_split": TEST}
    unpruned = graph if name == UNPRUNED else build_traced(base.model, (3, size, size))[1]
    source = make_source(base, (3, size, size), gator.MacsCost(graph), curve=None)
    row = {
        "trial_id": name,
        "kind": UNPRUNED if name == UNPRUNED else REFERENCE,
        "status": FINISHED,
        **accuracy,
        **measure_latencies(source, network.eval(), architecture, base.profile),
        **size_metrics(graph, architecture, unpruned.full_macs),
    }
    return row, take_curve(network, graph, base.profile).to_json() if takes_curve else None


def curve_error(curve_file: Path, profile: ProfileConfig) -> float | None:
    """Return the share by which the latency curve of a search misses its points on average; None if there is no curve.

    Raises: LatencyTableError if it is damaged.
    """
    return Curve.from_json(curve_file.read_bytes()).error(profile.batch_sizes[0]) if curve_file.exists() else None


def build_fixed(
    model: ModelConfig, widths: str | None, image_size: int
) -> tuple[nn.Module, gator.ChannelGraph, gator.Architecture]:
    """Return a network with random weights, pruned to its widths if it has any, its graph, and what it keeps."""
    network, graph = build_traced(model, (3, image_size, image_size))
    if widths is None:
        return network, graph, gator.Architecture.full(graph)
    architecture = architecture_of(graph, widths)
    return gator.prune(network, graph, architecture), graph, architecture


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
        raise ConfigError(f"widths {file}: {', '.join(unknown)} is not a layer whose channels can be pruned")
    return gator.Architecture.from_keep(graph, keep)


def _read_channels(file: str) -> dict[str, int]:
    path = Path(file) if Path(file).is_file() else SHIPPED / file
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
