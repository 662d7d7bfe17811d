"""From a graph of Dynamo to a step that runs: capture, pipelines, lowering, backends."""
