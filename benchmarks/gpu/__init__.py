"""Placements on real GPUs: whole layers and models replayed, ranks emulated, migration and recorder timed.

``python -m benchmarks.gpu prepare`` fits placements and cuts held-out routing where the solvers are,
``... run`` measures on a machine with GPUs, which needs torch, transformers and this source tree alone, and
``... table`` writes ``benchmarks/results/gpu.md``.
"""
