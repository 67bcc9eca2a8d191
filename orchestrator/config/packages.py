"""Packages that only some options need."""

import importlib.util
from collections.abc import Sequence

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing_packages(names: Sequence[str]) -> list[str]:
    """Return those of the packages that are not installed; none of them is imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]
