"""How well feedback weights align with forward weights: a single reading, and readings over time."""

from pyfeedback.metrics.alignment import LayerAlignment, alignment, angle, weight_transport
from pyfeedback.metrics.monitor import Monitor

__all__ = ["LayerAlignment", "Monitor", "alignment", "angle", "weight_transport"]
