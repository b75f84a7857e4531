"""Other libraries' calls, served by nearfar's operators. Each module imports its library when it is used, not before."""

from nearfar.integrations import fla, flash_attn, transformers

__all__ = ["fla", "flash_attn", "transformers"]
