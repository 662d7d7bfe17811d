"""Nodes are named after their layer."""

from qcompiler.exporting.passes.name_nodes import NameNodes

MODEL = """
g (float[2,4] x) => (float[2,4] y)
{
    a = Relu(x)
    b = Relu(a)
    c = Relu(b)
    y = Relu(c)
}"""


def make(parse_model):
    """Two nodes of a layer, one of a quantizer in that layer, one of the model itself."""
    subject = parse_model(MODEL)
    scopes = ["['', 'body.0', 'relu']", "['', 'body.0', 'relu_1']", "['', 'body.0', 'q']", "['', 'relu']"]
    for node, scope in zip(subject.graph, scopes, strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scope
    node = list(subject.graph)[2]
    node.name, node.metadata_props["site"] = "body.0/input/Scale", "body.0/input"
    return subject


def test_golden_name_nodes(parse_model, settle_onnx, onnx_text, golden):
    subject = make(parse_model)
    before = onnx_text(subject)
    assert settle_onnx(subject, NameNodes()) == 4
    golden(before=before, after=onnx_text(subject))
    assert {key for node in subject.graph for key in node.metadata_props} == {"site"}


def test_other_names_stay(parse_model, settle_onnx):
    assert settle_onnx(parse_model(MODEL), NameNodes()) == 0
