"""The key of a capture: the graph of Dynamo, its inputs, the names of the user, and the process."""

import logging
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from qcompiler.compiler.cache import cache_compat
from qcompiler.compiler.cache.process import describe_process
from qcompiler.compiler.cache.texts import Key, UncachedError, describe_graph, describe_inputs, hash_texts
from qcompiler.compiler.capture import describe_input
from qcompiler.compiler.naming import FrameNames
from qcompiler.compiler.shared_memory import find_shared

logger = logging.getLogger("qcompiler")


def make_capture_key(module: GraphModule, inputs: Sequence[Any], names: FrameNames) -> Key | None:
    """Return the key of the capture of a graph; None if it cannot be kept on disk, with the reason in the log."""
    if cache_compat.find_cache() is None:
        return None
    try:
        return Key("capture", names.place, _hash_capture(module, inputs, names))
    except Exception as error:  # a question to torch that fails, too: the cache costs time alone
        reason = str(error) if isinstance(error, UncachedError) else f"{type(error).__name__}: {error}"
        logger.info("capture of %s: not kept for the next process: %s", names.place, reason)
    return None


def _hash_capture(module: GraphModule, inputs: Sequence[Any], names: FrameNames) -> str:
    if find_shared(inputs, range(len(inputs))):
        raise UncachedError("inputs that share memory, which torch may guard while it traces")
    placeholders = module.graph.find_nodes(op="placeholder")
    facts = [describe_input(node, given, names) for node, given in zip(placeholders, inputs, strict=True)]
    graph = describe_graph(module, names.path)
    return hash_texts(describe_process(), graph, describe_inputs(inputs), repr((facts, names.root)))
