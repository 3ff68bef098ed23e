# %%
"""Teacher-forced KL, step by step: a notebook as a script (cells start with `# %%`).

python examples/teacher_forced_kl.py                                  # the demo model
python examples/teacher_forced_kl.py --model ORIGINAL --candidate FINE-TUNE
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_kl import DatasetSpec, TeacherForcedKL
from heretic_kl.demo import ensure_base_model, ensure_demo_model

parser = argparse.ArgumentParser(description="Measure two models by teacher-forced KL.")
parser.add_argument("--model", help="the original; default: the demo's base model")
parser.add_argument("--candidate", help="the changed model; default: the demo model, or --model")
parser.add_argument("--kl-tokens", type=int, default=8)
parser.add_argument("--prompts", type=int, default=32)
# Notebooks bring arguments of their own.
arguments = parser.parse_known_args()[0]

# %% [markdown]
# ## Two models with one tokenizer
# By default: SmolLM2-135M-Instruct, and the same model taught to refuse.

# %%
original = arguments.model or str(ensure_base_model(notify=print))
candidate = arguments.candidate or arguments.model or str(ensure_demo_model(notify=print))
model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(original)

# %% [markdown]
# ## The reference, once
# The original responds to every prompt greedily. Every candidate is fed its responses, so that
# both always see the same prefix.

# %%
kl = TeacherForcedKL(
    model,
    tokenizer,
    prompts=DatasetSpec("builtin:harmless", "test", limit=arguments.prompts),
    kl_tokens=arguments.kl_tokens,
    dtype="float32",
)
print(f"{kl.prompts} prompts, up to {kl.kl_tokens} positions each; the first responses:")
for response in kl.responses()[:3]:
    print(f"  {response!r}")

# %% [markdown]
# ## Any number of candidates
# The model against itself is exactly 0: both take the same path through the same arithmetic.

# %%
itself = kl.score(model)
print(f"\nitself:     {itself}")


# %% [markdown]
# A candidate can be an object that was changed in memory: here all weights rounded to 6 bits a row.


# %%
@torch.no_grad()
def rounded(model, bits):
    """A copy with every linear weight of the layers rounded; the head stays."""
    changed = copy.deepcopy(model)
    for module in changed.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.copy_((module.weight / scale).round() * scale)
    return changed


six_bits = kl.score(rounded(model, 6))
print(f"6 bits:     {six_bits}")

# %% [markdown]
# Or a path: a folder, a hub id, an adapter.

# %%
fine_tune = kl.score(candidate)
print(f"candidate:  {fine_tune}")

# %% [markdown]
# ## Which of two candidates is closer?
# Both answered for the same prompts, so they are compared prompt by prompt: what makes one prompt
# harder than another cancels.

# %%
pair = six_bits.compare(fine_tune)
low, high = pair.interval if pair.interval is not None else (float("nan"), float("nan"))
print(f"\n6 bits less candidate: {pair.mean_difference:+.4g} nats (95% {low:+.4g} to {high:+.4g})")
print("distinguishable" if pair.distinguishable else "not distinguishable on these prompts")

# %% [markdown]
# ## Where in the response is the damage?
# First-token KL is the first line of this table, and nothing else of it.

# %%
print("\nposition  prompts  6 bits               candidate")
for ours, theirs in zip(six_bits.summary.profile, fine_tune.summary.profile, strict=True):
    cells = [
        f"{place.mean:.4f} ± {place.standard_error:.4f}"
        if place.mean is not None and place.standard_error is not None
        else "-"
        for place in (ours, theirs)
    ]
    print(f"{ours.position + 1:8d}  {ours.count:7d}  {cells[0]:19s}  {cells[1]}")
