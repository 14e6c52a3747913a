"""Adapters of model families, one file each.

To add a family, add one file here that defines `FAMILY`, a `ModelFamily`; the registry finds it.
"""

__all__: list[str] = []
