"""The key of a capture: the graph of Dynamo, its inputs, the names of the user, and the process."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from qcompiler.compiler import dynamo_graphs, torch_compat
from qcompiler.compiler.cache.process import describe_process
from qcompiler.compiler.cache.texts import UncachedError, describe_graph, describe_inputs, make_key
from qcompiler.compiler.naming import FrameNames

logger = logging.getLogger("qcompiler")


def make_capture_key(module: GraphModule, inputs: Sequence[Any], names: FrameNames) -> str | None:
    """Return the key of the capture of a graph; None if it cannot be kept on disk, with the reason in the log."""
    if torch_compat.find_cache() is None:
        return None
    try:
        _refuse_shared(inputs)
        process = describe_process()
        graph, given = describe_graph(module, names.path), describe_inputs(inputs)
    except UncachedError as error:
        logger.info("not kept for the next process: %s", error)
        return None
    except Exception as error:  # a question to torch that fails: the cache costs time alone
        logger.info("not kept for the next process: %s: %s", type(error).__name__, error)
        return None
    sources = [dynamo_graphs.placeholder_source(node) for node in module.graph.find_nodes(op="placeholder")]
    tensors = [names.tensor(source, one) for source, one in zip(sources, inputs, strict=True)]
    numbers = [dynamo_graphs.is_number(node) for node in module.graph.find_nodes(op="placeholder")]
    buffers = [id(one) in names.tensors for one in inputs]
    places = repr((sources, tensors, numbers, buffers, names.root))
    return make_key(process, graph, given, places)


def _refuse_shared(inputs: Sequence[Any]) -> None:
    memories = [given.untyped_storage()._cdata for given in inputs if isinstance(given, Tensor)]
    if len(set(memories)) < len(memories):
        raise UncachedError("inputs that share memory, which torch may guard while it traces")
