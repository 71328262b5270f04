"""Training without weight transport: feedback weights, and the rules by which they learn, as PyTorch ops.

model = pyfeedback.convert(model, "ia")                  # any model; the layers keep their weights
pyfeedback.alignment(model)                              # angles between feedback and forward weights
torch.ops.pyfeedback.fa_conv2d(x, weight, feedback, amp=1e-3, decay=2e-3)
"""

from pyfeedback import ops as ops  # isort: skip  # registers the ops
from pyfeedback import functional, integrations, metrics, nn, optim, reference, schedules
from pyfeedback.backends.dispatch import backend, current_backend, set_backend
from pyfeedback.backends.extension.loading import build_info
from pyfeedback.conversion import Conversion, convert, unconvert
from pyfeedback.guard import set_guard
from pyfeedback.init import Init
from pyfeedback.metrics import LayerAlignment, LayerStatus, Monitor, Status, alignment, status
from pyfeedback.nn.model import feedback_layers, feedback_parameters, forward_parameters
from pyfeedback.pretrained import load_feedback
from pyfeedback.rules import Rule, rule
from pyfeedback.small_start import start_small
from pyfeedback.tuning import tune

__version__ = build_info().version

__all__ = [
    "Conversion",
    "Init",
    "LayerAlignment",
    "LayerStatus",
    "Monitor",
    "Rule",
    "Status",
    "alignment",
    "backend",
    "build_info",
    "convert",
    "current_backend",
    "feedback_layers",
    "feedback_parameters",
    "forward_parameters",
    "functional",
    "integrations",
    "load_feedback",
    "metrics",
    "nn",
    "optim",
    "reference",
    "rule",
    "schedules",
    "set_backend",
    "set_guard",
    "start_small",
    "status",
    "tune",
    "unconvert",
]
