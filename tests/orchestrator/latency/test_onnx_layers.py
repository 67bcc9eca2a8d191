"""Layers timed alone in ONNX Runtime compute what PyTorch's do."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from gator.graph.ops import OpKind
from gator.latency.forward import conditions_on
from gator.latency.op_timing import OpChain, example_inputs
from orchestrator.latency.onnx_layers import _file_of, time_layer

CPU = torch.device("cpu")
CONV = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "bias": True}
DEPTHWISE = {name: value for name, value in CONV.items() if name != "groups"} | {"per_group": [1, 1]}
KINDS = {
    "convolution": ("conv2d", (0, 8, 8), CONV),
    "without bias, padded to the same size": (
        "conv2d",
        (0, 8, 8),
        CONV | {"bias": False, "stride": [1, 1], "padding": "same"},
    ),
    "depthwise": ("conv2d", (0, 8, 8), DEPTHWISE),
    "one dimension": ("conv1d", (0, 9), CONV | {"kernel": [3], "stride": [1], "padding": [2], "dilation": [2]}),
    "linear": ("linear", (0,), {"bias": True}),
    "linear of tokens": ("linear", (5, 0), {"bias": True}),
    "linear without bias": ("linear", (0,), {"bias": False}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_a_layer_computes_the_layer(name: str) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    op, shape, settings = KINDS[name]
    kind = OpKind(op, shape, json.dumps(settings))
    num_out = 16 if kind.has_two_widths else 8
    (images,) = example_inputs(kind, 8, 2, CPU, torch.float32)
    content, length = _file_of(kind, 8, num_out, tuple(images.shape))
    weights = [
        torch.from_numpy(onnx.numpy_helper.to_array(one).copy())
        for one in onnx.load_from_string(content).graph.initializer
    ]
    outputs = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(
        None, {"images": images.numpy()}
    )
    chain = OpChain(kind, 8, num_out, CPU, torch.float32)
    assert len(outputs) == length == chain.length
    own: list[Any] = weights[: len(chain.weights[0])]
    own[0] = own[0].T if op == "linear" else own[0]
    torch.testing.assert_close(torch.from_numpy(outputs[0]), chain.call([images], own), rtol=1e-4, atol=1e-4)


def test_a_layer_is_timed_under_the_conditions_it_is_given() -> None:
    pytest.importorskip("onnxruntime")
    settings: dict[str, Any] = {"dtype": "float32", "layout": "contiguous", "num_threads": 1, "is_folded": True}
    conditions = conditions_on(CPU, runtime="onnxruntime", batch_size=2, **settings)
    measured = time_layer((OpKind("linear", (0,), '{"bias": true}'), 64, 64), conditions)
    assert measured.median_ms > 0
    assert measured.conditions == replace(conditions)
