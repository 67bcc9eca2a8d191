"""Exports a network to one file that needs neither this project nor the network's class: ONNX, or a torch.export program."""

import io
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from orchestrator.errors import OrchestratorError, in_one_line
from orchestrator.models.onnx_session import OnnxSession
from orchestrator.storage.files import LEFTOVER_PREFIX, write_atomic

Format = Literal["onnx", "pt2"]
TOLERANCE = 1e-4
"""Largest difference relative to the largest output, in float32: ONNX Runtime fuses layers and sums in another order."""
TRACED_BATCH = 2
CHECKED_BATCHES = (1, 3)
"""Batch sizes other than the traced one, to detect a file that only takes the traced one."""


def write_network(network: nn.Module, images: Tensor, path: Path, form: Format) -> None:
    """Write a network in eval mode on the CPU to `path`, atomically, after the file was read back and its outputs compared.

    images: (N, ...) float inputs of the network, N >= 3. The exported network takes any N, and returns the same outputs.
    onnx needs the packages onnx, onnxscript and onnxruntime.
    Raises: OrchestratorError if the network cannot be written in this format, or the file gives other outputs; then there is
    no file, or still the old one.
    """
    write = {"onnx": _write_onnx, "pt2": _write_pt2}[form]
    with _failing_as(f"{path} is not written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{LEFTOVER_PREFIX}{secrets.token_hex(4)}.{path.name}")
    try:
        with _failing_as(f"{path} is not written: the network cannot be exported as {form}"), _quiet():
            write(network, images[:TRACED_BATCH], temporary)
        with _failing_as(f"{path} is not written"):
            check_file(network, images, temporary, form)
        with open(temporary, "rb") as file:  # the exporters do not flush it to disk
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_or_write(network: nn.Module, images: Tensor, path: Path, form: Format, kept: Path) -> None:
    """Copy the ONNX file `kept` to `path` if its outputs are the network's, else do as write_network().

    A file that was timed stays the one that is deployed: the exporter may give other bytes in another process.
    """
    if form == "onnx" and kept.is_file():  # a pt2 file is not read unless this process wrote it
        with suppress(OrchestratorError):
            check_file(network, images, kept, form)
            with _failing_as(f"{path} is not written"):
                write_atomic(path, kept.read_bytes())
            return
    write_network(network, images, path, form)


def check_file(network: nn.Module, images: Tensor, path: Path, form: Format) -> None:
    """Read the file back, run it for batch sizes other than the traced one, and compare its outputs with the network's.

    Raises: OrchestratorError if it cannot be run or its outputs differ by more than TOLERANCE.
    """
    read = {"onnx": _read_onnx, "pt2": _read_pt2}[form]
    with _failing_as(f"as {form} the network cannot be read back and run"), torch.no_grad():
        run = read(path)
        outputs = [(network(images[:batch]), run(images[:batch])) for batch in CHECKED_BATCHES]
    for expected, found in outputs:
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:  # nan is not
            raise OrchestratorError(
                f"as {form}, for {len(expected)} images, its outputs differ from the network's by {error:.1e} of the largest, "
                f"expected at most {TOLERANCE:.0e}"
            )


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Turn any exception of an exporter or a runtime into an OrchestratorError."""
    try:
        yield
    except Exception as error:
        raise OrchestratorError(f"{what}: {in_one_line(error)}") from error


def _write_pt2(network: nn.Module, images: Tensor, path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=_any_batch(), strict=False)
    torch.export.save(program, path)


def _read_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    torch.onnx.export(
        network,
        (images,),
        path,
        dynamo=True,
        dynamic_shapes=_any_batch(),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,  # one file; a protobuf ends at 2 GB
        verbose=False,
    )


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    return OnnxSession(path)


def _any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress messages and warnings; failures are raised as errors."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
