"""Packs of tasks: K vector environments stepped as one."""
