"""The figures of planning, a module for each command."""
