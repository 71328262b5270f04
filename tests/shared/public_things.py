"""The public names of a module, for the tests of their docstrings and of the reference."""

import inspect


def public_things(module):
    """The public functions and classes that a module defines."""
    for name, thing in vars(module).items():
        defined = inspect.isfunction(thing) or inspect.isclass(thing)
        if defined and not name.startswith("_") and thing.__module__ == module.__name__:
            yield thing, f"{module.__name__}.{name}"
