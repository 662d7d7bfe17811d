"""The joint graph as a network, drawings, tables."""
