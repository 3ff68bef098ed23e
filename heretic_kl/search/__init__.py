"""The search: space, sampler, study, records, Pareto front. Optuna lives here and nowhere else."""

from heretic_kl.search.pareto import check_rule, knee, pareto_front, pick, spread
from heretic_kl.search.records import UNEDITED, TrialRecord
from heretic_kl.search.space import SearchSpace
from heretic_kl.search.storage import open_storage, without_password
from heretic_kl.search.study import SearchStudy

__all__ = [
    "UNEDITED",
    "SearchSpace",
    "SearchStudy",
    "TrialRecord",
    "check_rule",
    "knee",
    "open_storage",
    "pareto_front",
    "pick",
    "spread",
    "without_password",
]
