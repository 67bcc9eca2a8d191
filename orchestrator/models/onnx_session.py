"""A session of ONNX Runtime: an exported file, ready to run on a device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import ConfigError

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
CPU_DEVICE = torch.device("cpu")


class OnnxSession:
    """Runs an exported file, or the bytes of one. By default on the CPU, with ONNX Runtime's own number of threads.

    with_tensorrt: through ONNX Runtime's provider of TensorRT.    is_float16: whether TensorRT may compute in float16.
    Raises: ConfigError if the installed ONNX Runtime cannot run on the device.
    """

    def __init__(
        self,
        path: Path | bytes,
        *,
        device: torch.device = CPU_DEVICE,
        num_threads: int = 0,
        with_tensorrt: bool = False,
        is_float16: bool = False,
    ) -> None:
        import onnxruntime  # late: an optional package

        self._device = device
        self._runtime = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        self._session = onnxruntime.InferenceSession(
            path, options, providers=self._providers(with_tensorrt, is_float16)
        )

    @property
    def versions(self) -> dict[str, str]:
        """The version of ONNX Runtime."""
        return {"onnxruntime": self._runtime.__version__}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images on the CPU."""
        return torch.from_numpy(self._session.run(["logits"], {"images": images.numpy()})[0])

    def call(self, images: Tensor) -> Callable[[], object]:
        """Return a call for images that are on the device already; it returns when its result is there."""
        if self._device.type == "cpu":
            feed = {"images": images.numpy()}
            return lambda: self._session.run(None, feed)
        place = self._device.type, self._device.index or 0
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", self._runtime.OrtValue.ortvalue_from_numpy(images.cpu().numpy(), *place))
        binding.bind_output("logits", *place)
        return lambda: self._session.run_with_iobinding(binding)

    def _providers(self, with_tensorrt: bool, is_float16: bool) -> list[tuple[str, dict[str, Any]]]:
        if self._device.type == "cpu":
            return [(CPU, {})]
        on_device = {"device_id": self._device.index or 0}
        wanted = [(CUDA, on_device)]
        if with_tensorrt:
            wanted.insert(0, (TENSORRT, {**on_device, "trt_fp16_enable": is_float16}))
        found = self._runtime.get_available_providers()
        if wanted[0][0] not in found:
            raise ConfigError(
                f"the installed ONNX Runtime has the providers {', '.join(found)}, expected {wanted[0][0]} to time networks on "
                "a GPU; install onnxruntime-gpu there, for tensorrt with TensorRT, or set another profile.runtime"
            )
        return wanted
