"""The `mtrl` command line."""
