"""Several processes on one study: `heretic-kl worker`, `heretic-kl storage`, `--workers`."""
