"""What kinds of sites a model has, in words for a table. Runs no model."""

from __future__ import annotations

import re
from collections import Counter

from heretic_kl.model import LanguageModel, Site


def site_kinds(lm: LanguageModel) -> dict[str, int]:
    """Sites by kind: which mixer of tokens, or how an MLP or its experts are stored."""
    lists = Counter((s.key.layer, re.sub(r"\d+", "#", s.key.path)) for s in lm.architecture.sites)
    kinds: Counter[str] = Counter()
    for site in lm.architecture.sites:
        alike = lists[site.key.layer, re.sub(r"\d+", "#", site.key.path)]
        kinds[_kind(lm, site, alike > 1 and "expert" in site.key.path)] += 1
    return dict(sorted(kinds.items()))


MIXERS = {
    "linear attention": (
        "delta",
        "linearattention",
        "lightning",
        "lstmlayer",
        "kda",
        "gatedlinear",
    ),
    "state space": ("mamba", "recurrentblock", "bambamixer", "falconh1mixer"),
    "convolution": ("conv",),
    "attention": ("attention", "attn", "mla", "jetmoemoa"),
}
"""Kind of token mixer -> parts of class names, the first that fits counts."""


def _kind(lm: LanguageModel, site: Site, in_list: bool) -> str:
    holder = lm.model.get_submodule(site.key.path.rpartition(".")[0])
    name = type(holder).__name__.lower()
    for kind, parts in MIXERS.items():
        if any(part in name for part in parts):
            return kind
    if site.tensors and site.matrix() is None:
        return "experts in one tensor"
    if in_list:
        return "experts in a list"
    return "mlp" if site.key.component == "mlp" or "mlp" in name else "other token mixer"
