"""Packages trained networks as MLflow models, in a process of its own."""

from pathlib import Path

import torch

import gator
from orchestrator.errors import first_line
from orchestrator.models.deployment import check_file
from orchestrator.models.networks import example_images
from orchestrator.models.saved import load_trial
from orchestrator.storage.paths import RunPaths

PROGRAM = Path("data", "model.pt2")
"""Where MLflow's pytorch flavour puts the torch.export program."""


def package(run_dir: str, trial_ids: list[str], folder: str) -> dict[str, str]:
    """Write each trial's network as an MLflow model to folder/<trial id>; return {trial id: why it could not be}.

    Meant for a process of its own: it imports MLflow's pytorch flavour, and exporting takes memory.
    """
    run, errors = RunPaths(Path(run_dir)), {}
    for trial_id in trial_ids:
        try:
            _package(run, trial_id, Path(folder, trial_id))
        except Exception as error:  # torch.export raises many types; a network without a model is still a result
            errors[trial_id] = first_line(error)
    return errors


def _package(run: RunPaths, trial_id: str, folder: Path) -> None:
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    paths = run.trial(trial_id)
    network = load_trial(run.root, trial_id)  # first: it refuses links
    (shape,) = gator.Architecture.load(paths.architecture).input_shapes
    images = example_images(tuple(shape[1:]), 3)
    with torch.no_grad():
        num_classes = network(images).shape[-1]

    def any_batch(*sizes: int) -> Schema:
        return Schema([TensorSpec(np.dtype("float32"), (-1, *sizes))])

    version = torch.__version__.partition("+")[0]  # cpu and cu130 builds read each other's programs
    mlflow.pytorch.save_model(
        network,
        str(folder),
        serialization_format="pt2",
        input_example=images[:2].numpy(),  # a batch of one would be baked in
        signature=ModelSignature(any_batch(*shape[1:]), any_batch(num_classes)),
        pip_requirements=[f"torch=={version}", "numpy"],
        extra_files=[str(paths.architecture), str(paths.weights)],
    )
    check_file(network, images, folder / PROGRAM, "pt2")
