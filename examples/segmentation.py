"""Prune a segmentation network of torchvision: networks other than classifiers are pruned in the same way.

    pip install torchvision                # next to gator
    python examples/segmentation.py

The images are bright squares on noise, made here, so that it runs in less than a minute on a CPU.
Of a detector, prune the backbone: trace `detector.backbone`, set `detector.backbone = gator.GatedModel(...)`, train the detector
with the gates' loss, and set `detector.backbone = detector.backbone.prune()`.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import gator

SIZE, BATCH = 64, 16


def squares() -> tuple[Tensor, Tensor]:
    """Return images (BATCH, 3, SIZE, SIZE), and the class of each pixel: 1 within the square."""
    masks = torch.zeros(BATCH, SIZE, SIZE, dtype=torch.int64)
    for mask in masks:
        side = int(torch.randint(20, 44, ()))
        left, top = (int(torch.randint(0, SIZE - side, ())) for _ in "xy")
        mask[top : top + side, left : left + side] = 1
    return torch.randn(BATCH, 3, SIZE, SIZE) / 2 + masks[:, None], masks


def train(model: nn.Module, parameters: object, num_steps: int, gate_loss: gator.GateLoss | None = None) -> None:
    """Train; gate_loss: while the model has gates."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for step in range(num_steps):
        images, masks = squares()
        loss = cross_entropy(model(images)["out"], masks)
        if gate_loss is not None:
            loss = loss + gate_loss(model, step / num_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def overlap(model: nn.Module) -> float:
    """Return the intersection over union of the squares, on new images."""
    # The running averages of this network's batch norms take a thousand steps to settle; the exact ones take 20 forward passes.
    gator.reestimate_batchnorm(model, (squares()[0] for _ in range(20)))
    images, masks = squares()
    with torch.inference_mode():
        found = model.eval()(images)["out"].argmax(1)
    model.train()
    return ((found & masks).sum() / (found | masks).sum()).item()


def main() -> None:
    """Train, gate, prune and fine-tune; print what is left."""
    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    train(model, model.parameters(), num_steps=60)
    before = overlap(model)

    graph = gator.trace(model, torch.zeros(1, 3, SIZE, SIZE))
    cost = gator.MacsCost(graph)
    gated = gator.GatedModel(model, graph)
    train(gated, gated.param_groups(lr=2e-3, cost=cost), 40, gator.GateLoss(cost, target_ratio=0.5))

    small = gated.prune()
    train(small, small.parameters(), num_steps=30)
    left = cost(gated.architecture()) / cost.full
    print(f"unpruned: overlap {before:.2f}, {cost.full:,.0f} MACs")
    print(f"pruned:   overlap {overlap(small):.2f}, {left:.0%} of them")


if __name__ == "__main__":
    main()
