"""Static int8 of an exported model keeps its accuracy where the inside of activations is left alone."""

import pytest
import torch
from torch import nn

import hf_gem

onnx = pytest.importorskip("onnx", reason="models are exported to it")
pytest.importorskip("onnxscript", reason="torch exports by it")
runtime = pytest.importorskip("onnxruntime", reason="it quantises and runs what was exported")
datasets = pytest.importorskip("sklearn.datasets", reason="it brings images of digits")


def digits():
    """Images and labels for training, and for testing."""
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    return x[:1400], y[:1400], x[1400:], y[1400:]


def trained(name, x, y):
    torch.manual_seed(0)
    act = lambda: hf_gem.get_activation(name)  # noqa: E731
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), act(), nn.Conv2d(16, 16, 3, padding=1, stride=2)),
        *(nn.BatchNorm2d(16), act(), nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(120):
        batch = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()


def run(file, x):
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.tensor(logits)


def accuracy(logits, y):
    return (logits.argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("name", ["gem_n2", "segem_n3_eps0.5"])
def test_static_int8(name, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    x, y, test_x, test_y = digits()
    file = tmp_path / "model.onnx"
    program = torch.onnx.export(trained(name, x, y), (x[:8],), dynamo=True, verbose=False, dynamic_shapes=({0: "b"},))
    program.save(str(file))
    model = onnx.load(file)
    nodes = hf_gem.activation_nodes(model)
    outside = {node.op_type for node in model.graph.node if node.name not in nodes}
    assert outside - {"Shape", "Concat"} == {"Conv", "Gemm", "Reshape"}  # some exporters compute shapes in the model

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{model.graph.input[0].name: x[i : i + 50].numpy()} for i in range(0, 500, 50)])

        def get_next(self):
            return next(self.batches, None)

    logits = run(file, test_x)
    quantised = []
    for excluded in (nodes, []):
        int8 = str(tmp_path / "int8.onnx")
        quantization.quantize_static(onnx.load(file), int8, Reader(), nodes_to_exclude=excluded)
        quantised.append(run(int8, test_x))
    assert accuracy(logits, test_y) > 0.85
    assert accuracy(quantised[0], test_y) > accuracy(logits, test_y) - 0.02
    errors = [(found - logits).norm() for found in quantised]
    assert errors[0] < errors[1] / 4  # 0.01 of the logits against 0.14 and 0.17


def test_what_has_no_activation():
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"], name="r")], "g", [], [])
    with pytest.raises(ValueError, match="no node of this model comes from an activation module"):
        hf_gem.activation_nodes(onnx.helper.make_model(graph))
    with pytest.raises(TypeError, match=r"got str\. .* takes an onnx\.ModelProto\. Load it with onnx\.load"):
        hf_gem.activation_nodes("model.onnx")
