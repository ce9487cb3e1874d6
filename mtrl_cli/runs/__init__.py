"""The run folder: records, metrics, progress display, videos, stop signals."""
