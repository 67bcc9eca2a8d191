"""How networks are timed: the runtime, the dtype, the layout and the threads of a profile, with its defaults filled in for a device.

Every latency of a search is timed by these: of trials, baselines, the unpruned network, references, curves and tables.
"""

import copy
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import gator
from gator.latency.forward import TORCH_RUNTIMES, Compiled, conditions_on, time_call
from gator.latency.measurement import Conditions, Runtime
from orchestrator.config.trial import ProfileConfig
from orchestrator.models.deployment import CHECKED_BATCHES, write_network
from orchestrator.models.networks import example_images
from orchestrator.models.onnx_session import OnnxSession


@dataclass(frozen=True, kw_only=True)
class Timer:
    """A network that is ready to be timed in its runtime."""

    time: Callable[..., gator.LatencyMeasurement]
    """Takes num_repeats and max_warmup by name, as gator.time_forward does."""
    file_sha256: str | None = None
    """Of the exported file that is timed; None in PyTorch's runtimes."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How networks are timed on a device."""

    device: torch.device
    runtime: Runtime
    dtype: str
    layout: Literal["contiguous", "channels_last"]
    num_threads: int

    @classmethod
    def on(cls, device: torch.device, profile: ProfileConfig) -> "Timing":
        """Return what the profile asks for; where it leaves the choice, what is common on this kind of device.

        On a GPU the launches of eager mode take longer than the kernels of a small batch, so a CUDA graph is timed there.
        """
        is_gpu = device.type == "cuda"
        runtime: Runtime = ("cuda_graph" if is_gpu else "eager") if profile.runtime == "auto" else profile.runtime
        by_runtime = {"onnxruntime": "float32", "tensorrt": "float16"}
        dtype = (
            by_runtime.get(runtime, "float16" if is_gpu else "float32") if profile.dtype == "auto" else profile.dtype
        )
        layout = profile.layout
        if layout == "auto":
            layout = "channels_last" if is_gpu and runtime in TORCH_RUNTIMES else "contiguous"
        return cls(device=device, runtime=runtime, dtype=dtype, layout=layout, num_threads=profile.num_threads)

    def timers(
        self, network: nn.Module, input_shape: tuple[int, ...], batch_sizes: Sequence[int], file: Path | None = None
    ) -> dict[int, Timer]:
        """Return for each batch size a copy of the network that is ready to be timed for that many example images.

        file: where an exported network stays; None for nowhere.
        Raises: OrchestratorError if the network cannot be exported, ConfigError if the runtime does not run on this device.
        """
        if self.runtime in TORCH_RUNTIMES:
            network = self._laid_out(network)
            return {size: self._torch_timer(network, input_shape, size) for size in batch_sizes}
        with tempfile.TemporaryDirectory() as folder:
            path = file or Path(folder) / "network.onnx"
            images = example_images(input_shape, max(CHECKED_BATCHES))
            write_network(copy.deepcopy(network).cpu().eval(), images, path, "onnx")
            return {size: self.file_timer(path, input_shape, size) for size in batch_sizes}

    def timer(self, network: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> Timer:
        """Return a copy of the network that is ready to be timed; see timers."""
        return self.timers(network, input_shape, [batch_size])[batch_size]

    def file_timer(self, file: Path, input_shape: tuple[int, ...], batch_size: int) -> Timer:
        """Return an exported file, ready to be timed in the runtime of exported files."""
        session = OnnxSession(
            file,
            device=self.device,
            num_threads=self.num_threads,
            with_tensorrt=self.runtime == "tensorrt",
            is_float16=self.dtype == "float16",
        )
        time = partial(
            time_call,
            session.call(example_images(input_shape, batch_size)),
            self._conditions(batch_size, session.versions),
            input_shapes=((batch_size, *input_shape),),
        )
        return Timer(time=time, file_sha256=hashlib.sha256(file.read_bytes()).hexdigest())

    def conditions(self, input_shape: tuple[int, ...], batch_size: int) -> Conditions:
        """Return the conditions of every latency that is timed so."""
        return self.timer(_Same(), input_shape, batch_size).time(num_repeats=1).conditions

    def _torch_timer(self, network: nn.Module, input_shape: tuple[int, ...], batch_size: int) -> Timer:
        images = example_images(input_shape, batch_size).to(self.device, getattr(torch, self.dtype))
        images = images.contiguous(memory_format=self._memory_format)
        network = Compiled(network) if self.runtime == "compile" else network  # once, and timed in many turns

        time = partial(gator.time_forward, network, images, runtime=self.runtime, num_threads=self.num_threads)
        return Timer(time=time)

    def _conditions(self, batch_size: int, versions: dict[str, str]) -> Conditions:
        return conditions_on(
            self.device,
            dtype=self.dtype,
            layout=self.layout,
            runtime=self.runtime,
            batch_size=batch_size,
            num_threads=self.num_threads,
            is_folded=True,  # by the exporter
            versions=versions,
        )

    def _laid_out(self, network: nn.Module) -> nn.Module:
        network = copy.deepcopy(network).to(self.device, getattr(torch, self.dtype))
        return network.to(memory_format=self._memory_format)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format


class _Same(nn.Module):
    """The smallest network that any runtime takes."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(images)
