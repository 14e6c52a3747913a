"""Proved optima where a layer's placements can be enumerated."""
