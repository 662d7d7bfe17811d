"""The training of `qcompiler demo`, and the networks and measurements that the examples and benchmarks share."""
