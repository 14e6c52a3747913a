"""Adapters of model families.

A family that differs from others in names alone is one entry of `FAMILIES` in `transformers_v5`; one with
code of its own is one file here that defines `FAMILY`, a `ModelFamily`. The registry finds both. Models of
no family are recorded by `generic.GenericFamily`, which knows routers by their names.
"""

__all__: list[str] = []
