"""Passes over torch.fx graphs, one deed a file."""
