"""How a model becomes an artefact: one module a target, and the decoder graph that ONNX and Core ML share."""
