"""The passes over the joint graph, forward and backward together."""
