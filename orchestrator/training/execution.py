"""How a training step is computed on this device: precision, memory layout, compilation, micro-batches.

None of it changes what is learned beyond rounding. Accuracy and latency are taken in float32, whatever trains.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.config.trial import TrainingConfig

RECOMPILE_LIMIT = 64
"""Compilations of one forward pass, of which a schedule of image sizes needs one for each size; torch's own limit is 8."""

CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """TrainingConfig with its defaults filled in for a device."""

    device: torch.device
    is_bfloat16: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
    is_compiled: bool = False
    micro_batch_size: int | None = None

    @classmethod
    def on(cls, device: torch.device, config: TrainingConfig) -> "Execution":
        """Return what the config asks for; where it leaves the choice, what is faster on this kind of device.

        Networks of convolutions run faster on tensor cores, which want bfloat16 and channels last; a CPU without such
        units converts forth and back, and is slower.
        """
        is_gpu = device.type == "cuda"
        has_bfloat16 = is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        channels_last = is_gpu if config.channels_last is None else config.channels_last
        return cls(
            device=device,
            is_bfloat16=has_bfloat16 if config.precision == "auto" else config.precision == "bfloat16",
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
            is_compiled=config.compile,
            micro_batch_size=config.micro_batch_size,
        )

    def lay_out(self, network: nn.Module) -> None:
        """Bring the network's weights into the memory layout, in place; an optimizer keeps what it holds."""
        network.to(memory_format=self.memory_format)

    def compiled(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the network's forward pass, under torch.compile where that is asked for.

        Compiled for each size of the images: shapes that are compiled for any size are slower, also at the last size. What was
        compiled before is dropped: torch counts compilations of the same code, as of a network after each re-cut, and continues
        in eager mode after RECOMPILE_LIMIT of them.
        """
        if not self.is_compiled:
            return network
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        compiled: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False)
        return compiled

    def frozen(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the forward pass of a network that does not learn, for use under autocast; the network is changed in place.

        Its convolutions and linear layers are cast once: autocast casts weights that need no gradient in every pass.
        """
        self.lay_out(network)
        for module in network.modules() if self.is_bfloat16 else ():
            if isinstance(module, CAST_BY_AUTOCAST):
                module.to(torch.bfloat16)
        return self.compiled(network)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass and its loss."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bfloat16)

    def micro_batches(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the batch in parts of micro_batch_size, the last one maybe smaller."""
        images = images.to(memory_format=self.memory_format)
        size = self.micro_batch_size or len(images)
        return list(zip(images.split(size), labels.split(size), strict=True))
