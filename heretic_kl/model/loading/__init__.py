"""From a hub id, a folder or a GGUF file to a model in memory."""
