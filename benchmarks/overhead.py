"""What the recorder adds to a forward pass, and what ``import placement`` costs.

Run ``python -m benchmarks.overhead``. The bundled model runs the bundled text with and without the recorder
in turn, in CPU time of one thread; the figure is the median of the paired ratios. Import time is that of
``import placement`` less that of ``import numpy``, medians over fresh interpreters.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import environment

__all__ = ["main"]

PASSES = 40


def recorder_overhead(*, batch_size: int) -> float:
    """Return (time with the recorder) / (time without) - 1 over alternating passes, data set written."""
    import numpy as np
    import torch

    from placement.runtime.checkpoint import load_checkpoint, read_sequences
    from placement.runtime.samples import resolve_model, sample_texts
    from traces.record import recorder_for

    torch.set_num_threads(1)
    folder = resolve_model("byte16")
    plain, recorded = load_checkpoint(folder), load_checkpoint(folder)
    sequences = [s.tokens_T for s in read_sequences(folder, list(sample_texts()), max_length=1024)]
    full = np.stack([tokens for tokens in sequences if len(tokens) == 1024])
    batch = torch.from_numpy(full[:batch_size])

    def forward_s(model: torch.nn.Module) -> float:
        began_s = time.process_time()
        with torch.no_grad():
            model(batch)
        return time.process_time() - began_s

    without_s = with_s = 0.0
    with tempfile.TemporaryDirectory() as out:
        recorder = recorder_for(recorded, Path(out) / "trace")
        forward_s(plain), forward_s(recorded)
        for _ in range(PASSES):
            without_s += forward_s(plain)
            with_s += forward_s(recorded)
        began_s = time.process_time()
        recorder.close()
        with_s += time.process_time() - began_s
    return with_s / without_s - 1


def import_seconds() -> float:
    """Return the seconds that ``import placement`` takes beyond ``import numpy``."""

    def median(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        runs = [
            float(
                subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, check=True, text=True
                ).stdout
            )
            for _ in range(7)
        ]
        return statistics.median(runs)

    return median("import numpy; import placement") - median("import numpy")


def main() -> None:
    """Print the figures."""
    print(environment())
    print(f"import placement beyond numpy: {import_seconds():.3f} s")
    # The first recording of a process loads the writer and torch's lazy parts, once: not a cost per pass.
    recorder_overhead(batch_size=1)
    for batch_size in (1, 8):
        overhead = recorder_overhead(batch_size=batch_size)
        print(f"recorder, batch {batch_size} x 1024: {overhead:+.2%} of the forward pass")


if __name__ == "__main__":
    main()
