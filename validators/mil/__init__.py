"""An evaluator of ML programs (Core ML's intermediate language) in PyTorch, for machines that are no Macs."""
