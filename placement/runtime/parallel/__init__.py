"""Runs a model with its experts spread over the ranks of a process group, as a placement says.

Every rank holds the slots of its device and its own tokens; tokens travel to their experts and return.
"""
