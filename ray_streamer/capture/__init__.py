"""What does an engine's own loader want of a checkpoint? Learned from one run of it, with tensors that hold no values.

    recording        the loader runs, watched; what it copied becomes slices
    recorder         what each operation does to what is recorded
    lazy             the tensor that a loader is given
    lazy_operations  what comes of operations on such tensors alone
    memory           what a lazy tensor stands for
    pending          copies that are written down and not made
    strided          how strided views of one memory relate
    whole_tensors    tensors whose values the loader needs at once
    results          copies as results and moves
    report           what became of each tensor

Knows torch, and no engine.
"""

from ray_streamer.capture.recording import Capture
from ray_streamer.capture.report import CaptureReport, Group
from ray_streamer.capture.whole_tensors import Reader

__all__ = ["Capture", "CaptureReport", "Group", "Reader"]
