"""Times a convolution or a linear layer alone in ONNX Runtime, as a file of a few such nodes."""

from typing import Any

import torch

from gator.graph.ops import OpKind
from gator.latency.forward import time_call
from gator.latency.measurement import Conditions, LatencyMeasurement
from gator.latency.op_timing import REPEATS_PER_TURN, chain_length, example_inputs, weight_shapes
from gator.latency.table import Point
from orchestrator.models.onnx_session import OnnxSession


def time_layer(point: Point, conditions: Conditions, num_repeats: int = REPEATS_PER_TURN) -> LatencyMeasurement:
    """Return the time of one convolution or linear layer at a point, in ONNX Runtime on the CPU.

    Like time_op a session runs several on the same input, each with its own weights. Its input and outputs are plain tensors: where
    ONNX Runtime computes in blocks of channels, their conversion is part of the time, and the calibration takes it off again.
    """
    kind, num_in, num_out = point
    with torch.random.fork_rng(devices=[]):
        (images,) = example_inputs(kind, num_in, conditions.batch_size, torch.device("cpu"), torch.float32)
        content, length = _file_of(kind, num_in, num_out, tuple(images.shape))
    session = OnnxSession(content, num_threads=conditions.num_threads)
    measured = time_call(
        session.call(images),
        conditions,
        input_shapes=(tuple(images.shape),),
        num_repeats=num_repeats,
        max_warmup=0,  # as in time_op
    )
    return measured.divided(length)


def _file_of(kind: OpKind, num_in: int, num_out: int, input_shape: tuple[int, ...]) -> tuple[bytes, int]:
    """Return an ONNX file and how many layers it has, all of which read `images`."""
    import onnx  # late: an optional package
    from onnx import helper, numpy_helper

    shapes = weight_shapes(kind, num_in, num_out)
    length = chain_length(shapes)
    nodes, weights = [], []
    for number in range(length):
        names = [f"weight{number}", f"bias{number}"][: len(shapes)]
        tensors = [torch.rand(shape) for shape in shapes]
        if kind.name == "linear":
            tensors[0] = tensors[0].T.contiguous()
        weights += [numpy_helper.from_array(one.numpy(), name) for one, name in zip(tensors, names, strict=True)]
        output = f"output{number}"
        if kind.name != "linear":
            nodes.append(helper.make_node("Conv", ["images", *names], [output], **_settings(kind, num_in)))
        elif len(input_shape) == 2 and len(names) == 2:
            nodes.append(helper.make_node("Gemm", ["images", *names], [output]))
        else:
            product = output if len(names) == 1 else f"product{number}"
            nodes.append(helper.make_node("MatMul", ["images", names[0]], [product]))
            nodes += [helper.make_node("Add", [product, name], [output]) for name in names[1:]]
    float32 = onnx.TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(f"output{number}", float32, None) for number in range(length)]
    images = helper.make_tensor_value_info("images", float32, input_shape)
    graph = helper.make_graph(nodes, "layers", [images], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(), length


OPSET, IR_VERSION = 18, 10
"""Those of torch's exporter."""


def _settings(kind: OpKind, num_in: int) -> dict[str, Any]:
    """Return a convolution's settings by ONNX's names."""
    arguments = kind.arguments
    per_group = arguments.get("per_group")
    settings: dict[str, Any] = {
        "kernel_shape": arguments["kernel"],
        "strides": arguments["stride"],
        "dilations": arguments["dilation"],
        "group": num_in // per_group[0] if per_group else arguments["groups"],
    }
    padding = arguments["padding"]
    if isinstance(padding, str):
        return settings | {"auto_pad": {"same": "SAME_UPPER", "valid": "VALID"}[padding]}
    return settings | {"pads": [*padding, *padding]}
