"""Prune a timm model in plain PyTorch: half of the MACs go, in your own training loop, without the search.

    pip install timm scikit-learn          # next to gator
    python examples/prune_timm.py

The data are 1,797 handwritten digits of scikit-learn, so that it runs in less than a minute on a CPU.
Replace `create_model` and `digits` by your network and your data.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import gator

SIZE = 24


def digits() -> tuple[DataLoader, DataLoader]:
    """Return batches for training and for testing: images (N, 3, SIZE, SIZE), labels (N,)."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    data = TensorDataset(interpolate(images, SIZE, mode="bilinear"), torch.from_numpy(found.target))
    train, test = torch.utils.data.random_split(data, [1437, 360])
    return DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 360)


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float) -> None:
    """Train as you always do."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def top1(model: nn.Module, loader: DataLoader) -> float:
    """Return the accuracy in percent."""
    ((images, labels),) = loader
    with torch.inference_mode():
        right: Tensor = model.eval()(images).argmax(1) == labels
    model.train()
    return 100 * right.float().mean().item()


def main() -> None:
    """Train, gate, prune and fine-tune; print what is left."""
    torch.manual_seed(0)
    loader, test = digits()
    model = timm.create_model("resnet10t", num_classes=10, pretrained=False)
    train(model, loader, epochs=3, lr=0.05)
    before = top1(model, test)

    graph = gator.trace(model, torch.zeros(1, 3, SIZE, SIZE))
    gator.verify(model, graph, next(iter(loader))[0])  # refuses a network that cannot be pruned exactly
    cost = gator.MacsCost(graph)
    gated = gator.GatedModel(model, graph)
    gate_loss = gator.GateLoss(cost, target_ratio=0.5)
    optimizer = torch.optim.SGD(gated.param_groups(lr=0.01, cost=cost), momentum=0.9)
    epochs = 3
    for epoch in range(epochs):
        for step, (images, labels) in enumerate(loader):
            progress = (epoch + step / len(loader)) / epochs
            loss = cross_entropy(gated(images), labels) + gate_loss(gated, progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    small = gated.prune()  # a plain nn.Module; gator is not needed to run it
    gator.reestimate_batchnorm(small, (images for images, _ in loader))
    train(small, loader, epochs=2, lr=0.01)
    left = cost(gated.architecture()) / cost.full
    print(f"unpruned: top1 {before:.1f}, {cost.full:,.0f} MACs")
    print(f"pruned:   top1 {top1(small, test):.1f}, {left:.0%} of them")


if __name__ == "__main__":
    main()
