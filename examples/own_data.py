"""Your own images and your own network in a search: own_data.yaml names both.

    python examples/own_data.py                                        # writes data/shapes, in the layout that yours needs
    python -m orchestrator.search examples/own_data.yaml --dry-run     # checks everything, starts nothing
    python -m orchestrator.search examples/own_data.yaml

Run all three in the folder that holds examples/: Python finds `examples.own_data` there, on each worker too.
Images are in a folder per class, data/shapes/train/CLASS/*.png and data/shapes/test/CLASS/*.png. Other formats: docs/data.md.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import nn

SHAPES = ("circle", "square", "triangle")


def network(num_classes: int) -> nn.Module:
    """Return the network, with random weights: any nn.Module. The search calls this with model.num_classes and model.kwargs."""

    def layer(in_channels: int, out_channels: int) -> list[nn.Module]:
        """Return a convolution that halves the image."""
        convolution = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]

    body = [*layer(3, 16), *layer(16, 32), *layer(32, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def draw(shape: str, generator: np.random.Generator) -> Image.Image:
    """Return a picture of 48 x 48 pixels: the shape, of a random size, colour and place, on noise."""
    image = Image.fromarray(generator.integers(0, 80, (48, 48, 3), dtype=np.uint8))
    size = int(generator.integers(16, 30))
    left, top = (int(place) for place in generator.integers(0, 48 - size, 2))
    colour = tuple(int(part) for part in generator.integers(120, 255, 3))
    box = (left, top, left + size, top + size)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(left + size // 2, top), (left, top + size), (left + size, top + size)], fill=colour)
    return image


def main() -> None:
    """Write the images."""
    generator = np.random.default_rng(0)
    for split, count in {"train": 120, "test": 40}.items():
        for shape in SHAPES:
            folder = Path("data", "shapes", split, shape)
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                draw(shape, generator).save(folder / f"{index}.png")
    print(f"wrote data/shapes: {len(SHAPES)} classes, 360 images for training, 120 for testing")


if __name__ == "__main__":
    main()
