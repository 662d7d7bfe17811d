"""The graph as passes see it: facts of nodes, quantizers, names, and the ways to change it."""
