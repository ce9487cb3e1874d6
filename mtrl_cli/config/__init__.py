"""Compose, validate and describe configurations. Imports no torch."""
