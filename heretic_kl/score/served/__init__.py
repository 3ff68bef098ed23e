"""Models behind an OpenAI-compatible server, measured by log-probabilities of given token ids.

bound.py      a lower bound where only the likeliest tokens are known
exchange.py   token ids in, log-probabilities of the likeliest tokens out
candidate.py  such a model measured beside a reference; an adapter that a server ignores
"""

from heretic_kl.score.served.candidate import KnownTokens, compare_served
from heretic_kl.score.served.exchange import PromptEndpoint, ServedTokens, is_served

__all__ = ["KnownTokens", "PromptEndpoint", "ServedTokens", "compare_served", "is_served"]
