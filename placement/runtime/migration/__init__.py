"""Live change of placement: copies experts between ranks while the model stays in use.

Import the modules that you need; this package file imports nothing.
"""

__all__: list[str] = []
