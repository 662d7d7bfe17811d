"""The effect of every quantizer of a training step on the tensor and on the gradients, and the remedy."""
