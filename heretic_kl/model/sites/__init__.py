"""Layers and sites: found by zero-ablating modules, verified and inspected."""
