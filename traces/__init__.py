"""Routing traces: recorded, read from files, stored, summarised and synthesised.

`traces.trace` holds the data, `traces.readers` finds out what a file is, `traces.store` writes data sets,
`traces.statistics` turns a trace into what the optimizer needs. Nothing is imported here.
"""

__all__: list[str] = []
