"""Running the halves of a graph as one training step."""
