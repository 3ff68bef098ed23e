"""Figures of a measurement, computed anew in float64 by plain `transformers`; nothing of ours."""

import torch


@torch.no_grad()
def log_rows(model, sequences):
    """Log-probabilities (n, V) float64 at the scored positions of each sequence, one by one."""
    rows = []
    for sequence in sequences:
        ids = torch.tensor([[*sequence.prompt, *sequence.response]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        rows.append(logits[-len(sequence.response) :].log_softmax(-1))
    return rows


def mean_of_means(values, inside=None):
    """Mean over positions, then over prompts, of lists of (n,); and its standard error."""
    inside = [torch.ones(len(v), dtype=torch.bool) for v in values] if inside is None else inside
    means = [v[keep].mean() for v, keep in zip(values, inside, strict=True) if keep.any()]
    stacked = torch.stack(means)
    error = None if len(means) < 2 else float(stacked.std() / len(means) ** 0.5)
    return float(stacked.mean()), error


def token_rows(rows, sequences):
    """Log-probability of the fed token, (n,) for each sequence."""
    return [
        row.gather(-1, torch.tensor(sequence.response)[:, None])[:, 0]
        for row, sequence in zip(rows, sequences, strict=True)
    ]
