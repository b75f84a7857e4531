"""Pure-PyTorch references: the specification of every operator, and what runs on a machine without a GPU."""
