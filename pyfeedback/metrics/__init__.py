"""How well feedback weights align with forward weights: a reading, readings over time, and the status of each layer."""

from pyfeedback.metrics.alignment import LayerAlignment, alignment, angle, weight_transport
from pyfeedback.metrics.gradients import GradientAlignment, gradient_alignment
from pyfeedback.metrics.monitor import Monitor
from pyfeedback.metrics.status import LayerStatus, Status, status

__all__ = [
    "GradientAlignment",
    "LayerAlignment",
    "LayerStatus",
    "Monitor",
    "Status",
    "alignment",
    "angle",
    "gradient_alignment",
    "status",
    "weight_transport",
]
