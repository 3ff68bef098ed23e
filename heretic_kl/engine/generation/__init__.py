"""Responses to prompts: each stops when it ends or when its verdict is known."""
