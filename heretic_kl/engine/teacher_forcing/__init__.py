"""Teacher forcing: sequences, trees of tokens, batches, reductions of their logits."""
