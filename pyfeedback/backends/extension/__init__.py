"""The compiled library: how it is found and loaded, and the ops that it implements."""
