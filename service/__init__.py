"""The HTTP service that hands placements to launchers."""
