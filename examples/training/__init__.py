"""The parts of examples/train.py, one in each file."""
