"""Records which experts a model's routers select, by forward hooks that leave the model alone.

Off means no hook at all (`NullRecorder`).
"""

from __future__ import annotations

from placement.runtime.families.generic import GenericFamily
from traces.record.dataset import recorder_for
from traces.record.loads import LoadCounter
from traces.record.null import NullRecorder
from traces.record.recorder import Recorder, RecordingStopped
from traces.record.sinks import MemorySink, TraceSink
from traces.record.text import RecordReport, record_text
from traces.record.windows import LoadWindow, save_windows

__all__ = [
    "GenericFamily",
    "LoadCounter",
    "LoadWindow",
    "MemorySink",
    "NullRecorder",
    "RecordReport",
    "Recorder",
    "RecordingStopped",
    "TraceSink",
    "record_text",
    "recorder_for",
    "save_windows",
]
