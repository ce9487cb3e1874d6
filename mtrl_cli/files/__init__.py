"""Atomic file writes and file locks."""
