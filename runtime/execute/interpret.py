"""The one runner of graphs, node by node, with hooks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Interpreter, Node

#: a half that runs: takes and empties a list of inputs, and returns the outputs
Half: TypeAlias = Callable[[list[Any]], Sequence[Any]]


class Hooks:
    """The questions of a runner about every node. The methods of this class change nothing."""

    def before(self, node: Node) -> None:
        """Called before every node."""

    def load(self, node: Node, arguments: Any, values: Mapping[Node, Any]) -> Any:
        """Return the arguments of a node with a value for each node among them."""
        return torch.fx.map_arg(arguments, values.__getitem__)

    def after(self, node: Node, args: tuple[Any, ...], result: Any) -> None:
        """Called after every call, with the values of the arguments."""

    def instead(self, node: Node, result: Any) -> Any:
        """Return the value that the readers of a call get: the result."""
        return result


def make_runner(module: GraphModule, hooks: Hooks | None = None) -> Half:
    """Return a function that runs a graph node by node, without gradients, and drops each value after its last use."""

    def run(args: list[Any]) -> Sequence[Any]:
        given = list(args)
        args.clear()
        with torch.no_grad():
            runner = _Runner(module) if hooks is None else _HookedInterpreter(module, hooks)
            return runner.boxed_run(given)  # type: ignore[no-any-return]

    return run


class _Runner(Interpreter):
    """Runs nodes without noting which: torch notes it for the whole process, and captures of other threads read it."""

    def run_node(self, n: Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)


class _HookedInterpreter(_Runner):
    def __init__(self, module: GraphModule, hooks: Hooks) -> None:
        super().__init__(module)
        self.hooks = hooks

    def map_nodes_to_values(self, args: Any, n: Node) -> Any:
        return self.hooks.load(n, args, self.env)

    def run_node(self, n: Node) -> Any:
        self.hooks.before(n)
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        self.hooks.after(n, self.fetch_args_kwargs_from_env(n)[0], result)
        return self.hooks.instead(n, result)
