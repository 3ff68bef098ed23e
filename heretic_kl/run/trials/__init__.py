"""What is done with trials: search, refine, test, preview."""
