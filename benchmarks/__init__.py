"""Named instances with seeds and limits; tables kept over time in ``benchmarks/results``."""
