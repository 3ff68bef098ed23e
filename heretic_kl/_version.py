"""Versions, in a file of their own so that the build reads them without importing anything."""

__version__ = "0.1.0"

EVENTS_VERSION = 1
"""Of the lines that --json writes: raised when what a program relies on changes."""
