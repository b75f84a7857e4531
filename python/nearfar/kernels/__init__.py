"""Each operator on its kernels: layouts of outputs, and the launches of every backend."""
