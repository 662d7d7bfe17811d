"""What every quantizer of a training step does to its tensor and to the gradients, and what mends it."""
