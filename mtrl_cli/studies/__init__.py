"""Sweeps that answer one question and end with a report: `mtrl study` and `mtrl transfer`."""
