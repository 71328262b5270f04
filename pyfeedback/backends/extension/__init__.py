"""The compiled library: its loading, and the ops that it implements."""
