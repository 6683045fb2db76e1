"""ONNX: which operators of an exported model are inside activations, for a quantiser to leave them alone."""

from __future__ import annotations

from typing import Any

_CLASSES = "pkg.torch.onnx.class_hierarchy"  # where torch's exporter writes the modules that a node comes from


def activation_nodes(model: Any) -> list[str]:
    """The names of the nodes inside activations of the family, for `nodes_to_exclude` of a quantiser.

    Exported, `x^(2n+1) / (x^(2n) + eps)` is six operators, whose powers have too wide a range for eight bits: static
    int8 quantisation of each of them loses accuracy, most for n > 1. Left out, they run in float32, between an input
    and an output that are quantised:

        onnx_model = onnx.load("model.onnx")
        quantize_static(onnx_model, "int8.onnx", reader, nodes_to_exclude=hf_gem.activation_nodes(onnx_model))

    Args:
        model: An `onnx.ModelProto` from `torch.onnx.export(..., dynamo=True)`, before anything has fused its nodes.

    Returns:
        The names, in the order of the graph.

    Raises:
        TypeError: not a model of onnx.
        ValueError: no node of it says that it comes from an activation module of the family.
    """
    if not hasattr(model, "graph"):
        raise TypeError(f"activation_nodes takes an onnx.ModelProto, got {type(model).__name__}; use onnx.load(file)")
    names = [
        node.name
        for node in model.graph.node
        if any(prop.key == _CLASSES and "'hf_gem.modules." in prop.value for prop in node.metadata_props)
    ]
    if not names:
        raise ValueError(
            "no node of this model comes from an activation module of hf_gem; export a model with such modules by "
            "torch.onnx.export(..., dynamo=True), and call this before the graph is optimised"
        )
    return names
