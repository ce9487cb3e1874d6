"""Sweeps that answer one question: `mtrl study` and `mtrl transfer`."""
