"""One file a resource: parse, call, translate."""
