"""Passes over onnx_ir models."""
