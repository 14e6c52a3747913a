"""Placements in the forms that inference and training engines load, one engine a file.

Imported on use: `placement.formats.files` reads and writes, `placement.formats.layers` knows which layers
rows belong to, `placement.formats.permutation` is a placement as an order of experts.
"""
