"""Forward passes of an edited model: hooks, caches, tree attention, padding, packed weights."""
