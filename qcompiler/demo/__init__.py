"""What `qcompiler demo` trains, and the networks and measurements that the examples and benchmarks share."""
