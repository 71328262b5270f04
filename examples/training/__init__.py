"""The parts of examples/train.py; each file is one of them."""
