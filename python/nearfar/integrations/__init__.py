"""Interfaces of other libraries, computed by nearfar's operators. Each module imports its library at first use."""

from nearfar.integrations import fla, flash_attn, transformers

__all__ = ["fla", "flash_attn", "transformers"]
