"""Learnable quantizers, their observers, and where a target has them: the only package that imports torch.ao."""
