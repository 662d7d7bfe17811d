"""Training steps in which one quantizer alone is at work, all others let the tensors through."""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from qcompiler.compiler.cache.texts import Key
from qcompiler.compiler.capture import Captured
from qcompiler.compiler.graph_compiler import GraphCompiler
from qcompiler.compiler.lower import Lowered, lower_graph
from qcompiler.debugging.shadow import Watch, site_names
from qcompiler.passes.ir.quantizer import Quantizer, list_dequantizers
from qcompiler.passes.ir.walk import find_source
from qcompiler.recipes.recipe import Recipe
from qcompiler.runtime import ops
from qcompiler.runtime.ranges.store import RangeStore


class Solo:
    """The name of the site at work; None for no site, which is float."""

    def __init__(self) -> None:
        self.site: str | None = None


class SoloWatch(Watch):
    """Runs halves in which every dequantize of all sites but one gives back the tensor itself."""

    def __init__(self, module: GraphModule, solo: Solo) -> None:
        self.solo = solo
        self.sites = site_names(module)
        found = [(reader.floats.name, find_source(reader.codes)) for reader in list_dequantizers(module.graph)]
        #: name of a dequantize → site
        self.readers = {name: self.sites[quantizer.codes.name] for name, quantizer in found if quantizer is not None}
        self.tensors: dict[str, Tensor] = {}

    def after(self, node: Node, args: tuple[Any, ...], result: Any) -> None:
        """Keeps the quantized tensor."""
        if node.target is ops.QUANTIZE:
            self.tensors[self.sites.get(node.name, Quantizer(node).site)] = args[0]

    def instead(self, node: Node, result: Any) -> Any:
        """Return the tensor in front of the codes, if the site is not at work."""
        site = self.readers.get(node.name)
        return result if site is None or site == self.solo.site else self.tensors[site]


class SoloCompiler(GraphCompiler):
    """Makes such steps; for recipes without ranges of the past, one forward before each backward."""

    def __init__(self, recipe: Recipe, strict: bool, store: RangeStore) -> None:
        super().__init__(recipe, "eager", strict, store=store)
        self.solo = Solo()

    def lower(self, captured: Captured, key: Key | None) -> Lowered:
        """Quantize the graph, and lower it under a `SoloWatch`."""
        plan = self.quantize(captured)
        return lower_graph(captured, plan, SoloWatch(captured.module, self.solo).interpret, self.store)
