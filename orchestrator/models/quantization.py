"""Quantises an exported ONNX file to int8 with ONNX Runtime's own tools."""

import logging
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from orchestrator.errors import OrchestratorError, in_one_line
from orchestrator.models.onnx_session import OnnxSession
from orchestrator.storage.files import LEFTOVER_PREFIX, write_atomic

Int8 = Literal["dynamic", "static"]
"""static: weights and activations, whose ranges are taken from images. dynamic: weights of linear layers; activations are scaled in
each call, and convolutions stay in float32, as ONNX Runtime has no fast kernel for them so."""


class RunsFile(nn.Module):
    """An exported file as a network, on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = OnnxSession(path)
        self.versions = self._session.versions

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self._session(images)


def write_int8(float_file: Path, path: Path, kind: Int8, batches: Iterable[Tensor]) -> None:
    """Write an exported file quantised to int8, atomically.

    batches: images to take the ranges of activations from, for static.
    Raises: OrchestratorError if ONNX Runtime cannot quantise it.
    """
    import onnxruntime.quantization as quantization  # late: an optional package
    from onnxruntime.quantization.shape_inference import quant_pre_process

    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder:
        prepared, written = (
            Path(folder) / "prepared.onnx",
            Path(folder) / f"{LEFTOVER_PREFIX}{secrets.token_hex(4)}.onnx",
        )
        try:
            root.setLevel(logging.ERROR)  # the tools advise on the root logger
            if kind == "dynamic":
                quantization.quantize_dynamic(float_file, written, op_types_to_quantize=["MatMul", "Gemm"])
            else:
                quant_pre_process(float_file, prepared, skip_symbolic_shape=True)  # folds batch normalisation
                quantization.quantize_static(prepared, written, _reader(batches, quantization), per_channel=True)
        except Exception as error:  # its tools raise from many families
            raise OrchestratorError(
                f"{path} is not written: {float_file} cannot be quantised: {in_one_line(error)}"
            ) from error
        finally:
            root.setLevel(level)
        write_atomic(path, written.read_bytes())


def _reader(batches: Iterable[Tensor], quantization: Any) -> Any:
    class Reader(quantization.CalibrationDataReader):
        """Feeds the images, batch by batch."""

        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            """Return the next batch; None at the end."""
            images = next(self._batches, None)
            return None if images is None else {"images": images.numpy()}

    return Reader()
