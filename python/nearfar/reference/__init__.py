"""References in plain PyTorch: the specification of every operator, and the backend of CPU tensors."""
