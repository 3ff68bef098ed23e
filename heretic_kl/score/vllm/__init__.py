"""Models run by vLLM in this process: its kernels, its quantized weights, its adapters.

model.py      token ids in, full-vocabulary logits of the scored positions out
candidate.py  such a model measured beside a reference, and the floor across back ends
"""
