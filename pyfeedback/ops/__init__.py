"""Registration of the ops with PyTorch: schemas, implementations, fakes, autograd formulas and autocast."""

from pyfeedback.ops import schemas as schemas  # isort: skip  # must define the ops before they are implemented
from pyfeedback.ops import library as library
