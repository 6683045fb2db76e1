"""ONNX: lists the operators of an exported model that belong to activations, so that a quantiser can exclude them."""

from __future__ import annotations

from typing import Any

_CLASSES = "pkg.torch.onnx.class_hierarchy"  # torch's exporter stores the modules that a node comes from here


def activation_nodes(model: Any) -> list[str]:
    """Lists the nodes inside activations of the family, for `nodes_to_exclude` of a quantiser.

    `x^(2n+1) / (x^(2n) + eps)` is exported as six operators. Their powers have too wide a range for eight bits, so
    static int8 quantisation of these operators loses accuracy, most for n > 1. If they are excluded, they run in
    float32 between a quantised input and a quantised output:

        onnx_model = onnx.load("model.onnx")
        quantize_static(onnx_model, "int8.onnx", reader, nodes_to_exclude=hf_gem.activation_nodes(onnx_model))

    Args:
        model: An `onnx.ModelProto` from `torch.onnx.export(..., dynamo=True)`, whose nodes have not been fused.

    Returns:
        The names of the nodes, in the order of the graph.

    Raises:
        TypeError: `model` is not an ONNX model.
        ValueError: No node comes from an activation module of the family.
    """
    if not hasattr(model, "graph"):
        raise TypeError(
            f"got {type(model).__name__}. activation_nodes takes an onnx.ModelProto. Load it with onnx.load(file)."
        )
    names = [
        node.name
        for node in model.graph.node
        if any(prop.key == _CLASSES and "'hf_gem.modules." in prop.value for prop in node.metadata_props)
    ]
    if not names:
        raise ValueError(
            "no node of this model comes from an activation module of hf_gem. Only torch.onnx.export(..., dynamo=True) "
            "records that. Export a model with such modules in this way, and call this before you optimise the graph."
        )
    return names
