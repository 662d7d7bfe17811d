"""The graph of the passes: facts of nodes, quantizers, names, and the ways to change a graph."""
