"""What the layers share: the projections of grouped-query self-attention."""

from torch import nn

from nearfar.checks import require


class SelfAttention(nn.Module):
    """Projections of x (B, N, dim) to the q, k and v of heads, and of their output back; a layer puts its operator between.

    Args:
        dim, num_heads, num_kv_heads, bias: as for `nearfar.nn.KrauseAttention`.
        head_dim: width of a head of q and k; None: dim / num_heads.
        value_dim: width of a head of v; None: dim / num_heads.

    Raises:
        ValueError: a width or a number of heads does not fit.
    """

    def __init__(self, dim, num_heads, num_kv_heads, head_dim, value_dim, bias):
        super().__init__()
        require(num_heads >= 1, f"num_heads must be at least 1, got {num_heads}")
        if num_kv_heads is None:
            num_kv_heads = num_heads
        require(
            num_kv_heads >= 1 and num_heads % num_kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}",
        )
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = self._width("head_dim", head_dim)
        self.value_dim = self._width("value_dim", value_dim)
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.value_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * self.value_dim, dim, bias=bias)

    def _width(self, name, width):
        if width is None:
            require(
                self.dim % self.num_heads == 0,
                f"dim must be a multiple of num_heads unless {name} is given, got {self.dim} and {self.num_heads}",
            )
            return self.dim // self.num_heads
        require(width >= 1, f"{name} must be at least 1, got {width}")
        return width

    def split_heads(self, x):
        """x (B, N, dim) -> q (B, num_heads, N, head_dim), k and v (B, num_kv_heads, N, head_dim and value_dim)."""
        # Views: operators read the (B, N, H, D) projections through their strides and write o in the same order.
        return tuple(
            proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj, heads in (
                (self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads), (self.v_proj, self.num_kv_heads),
            )
        )  # fmt: skip

    def merge_heads(self, o):
        """o (B, num_heads, N, value_dim) -> (B, N, dim)."""
        return self.out_proj(o.transpose(1, 2).flatten(2))
