"""The hook of a training or serving loop: posts what routers do, and changes over to newer placements.

Import the modules that you need; this package file imports nothing.
"""

__all__: list[str] = []
