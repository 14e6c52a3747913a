"""Readers of trace files, one format a file; `traces.readers` lists them. Nothing is imported here."""

__all__: list[str] = []
