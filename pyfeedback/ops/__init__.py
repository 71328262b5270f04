"""What PyTorch is told about each op: its schema, implementation, fake, autograd formula and autocast."""

from pyfeedback.ops import schemas as schemas  # isort: skip  # defines the ops before anything implements them
from pyfeedback.ops import library as library
