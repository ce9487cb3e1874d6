"""Construct the objects of a run from its configuration. The only code that reads configuration values."""
