"""Public operators: docstring, checks, dispatch and torch.library registration, one file each."""
