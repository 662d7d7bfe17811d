"""Free dimensions by the names that the user gave them: `torch.export.Dim("batch")`, or `"batch"` for short."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from qcompiler.compiler import torch_compat
from qcompiler.exporting.dimension_checks import check_dims
from qcompiler.exporting.signature import flatten_shapes, get_signature
from qcompiler.exporting.trace import ExportError
from qcompiler.passes.ir.meta import get_value


def as_dims(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
    """`dynamic_shapes` as plain dicts and tuples, by argument, with one `Dim` for all strings of a name.

    Raises:
        ExportError: a string that is no name in Python, an entry that does not fit the call.
    """
    if isinstance(shapes, ShapesCollection):  # it knows the tensors of a call, and the call gets copies
        shapes = shapes.dynamic_shapes(model, args, kwargs)
    dims: dict[str, Dim] = {}

    def as_dim(one: Any) -> Any:
        if not isinstance(one, str):
            return one
        if not one.isidentifier():
            raise ExportError(
                f"export: dynamic_shapes: got {one!r}; valid: a name such as 'batch', or torch.export.Dim"
            )
        return dims.setdefault(one, Dim(one))

    shapes = flatten_shapes(model, kwargs, shapes)
    check_dims(get_signature(model, kwargs).bind(*args, **kwargs).arguments, shapes)
    return torch_compat.map_leaves(as_dim, shapes)


def find_symbol_names(program: ExportedProgram, model: nn.Module, shapes: Any) -> dict[str, str]:
    """Return symbol of a traced graph → the name of its dimension; `Dim.AUTO` gives none.

    Args:
        program: traced with `shapes`.
        shapes: as in torch.export.export.
    """
    if shapes is None or program.example_inputs is None:
        return {}
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    nodes = [node for node in program.graph.find_nodes(op="placeholder") if node.name in inputs]
    names: dict[str, str] = {}
    args, kwargs = program.example_inputs
    for node, spec in zip(nodes, _list_specs(model, args, kwargs, shapes), strict=True):
        for axis, dim in spec.items() if isinstance(spec, Mapping) else enumerate(spec or ()):
            root = getattr(dim, "root", dim)  # 2 * batch is made of batch
            found = torch_compat.list_symbols(get_value(node).shape[axis])
            if isinstance(root, Dim) and len(found) == 1:
                names[found[0]] = str(root.__name__)
    return names


def _list_specs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Any) -> Iterator[Any]:
    """Return the entry of `shapes` for each leaf of a call, None without one."""
    signature = get_signature(model, kwargs)
    if not isinstance(shapes, Mapping):
        shapes = dict(zip(signature.bind(*args, **kwargs).arguments, shapes, strict=False))
    for name, one in {**signature.bind_partial(*args).arguments, **kwargs}.items():
        yield from _list_inner_specs(one, shapes.get(name))


def _list_inner_specs(given: Any, spec: Any) -> Iterator[Any]:
    """The same for one argument, part by part."""
    parts = torch_compat.list_leaves(given)
    if len(parts) == 1 and parts[0] is given:
        yield spec
    elif spec is None or not isinstance(given, Mapping | tuple | list):
        yield from [None] * len(parts)
    elif isinstance(given, Mapping):
        for name, one in given.items():
            yield from _list_inner_specs(one, spec.get(name))
    else:
        for one, own in zip(given, spec, strict=True):
            yield from _list_inner_specs(one, own)
