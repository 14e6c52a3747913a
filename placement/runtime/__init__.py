"""Everything that touches a real model: family adapters, the in-process hook and its verification.

Import the modules that you need; this package file imports nothing, so that the core stays free of
torch.
"""

__all__: list[str] = []
