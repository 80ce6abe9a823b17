"""Graph in, graph out: passes over torch.fx and ONNX graphs that know nothing of detectors, training or files."""
