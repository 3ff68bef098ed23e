"""The search: space, sampler, study, records, Pareto front. Optuna lives here and nowhere else."""

from heretic_kl.search.fingerprint_check import changes, stored_batch_size
from heretic_kl.search.pareto import (
    alike_behind,
    by_score,
    check_rule,
    knee,
    meeting,
    notable_trials,
    pareto_front,
    pick,
    spread,
)
from heretic_kl.search.progress.importance import importances
from heretic_kl.search.records import UNEDITED, TrialRecord
from heretic_kl.search.report_file import RunFile
from heretic_kl.search.response_file import ResponseFile
from heretic_kl.search.sampler import quiet_optuna
from heretic_kl.search.screening import (
    FEWEST_PAIRS,
    LEAST_CORRELATION,
    RankCorrelation,
    Screened,
    Standing,
    foretold,
    promotes,
    rank_correlation,
)
from heretic_kl.search.space import SearchSpace, crowded_bounds
from heretic_kl.search.storage import (
    PlanStore,
    ReferenceStore,
    check_storage,
    open_storage,
    serve,
    storage_for_reading,
    without_password,
)
from heretic_kl.search.stored import StoredStudy, keep_run, read_study
from heretic_kl.search.study import SearchStudy

__all__ = [
    "FEWEST_PAIRS",
    "LEAST_CORRELATION",
    "UNEDITED",
    "PlanStore",
    "RankCorrelation",
    "ReferenceStore",
    "ResponseFile",
    "RunFile",
    "Screened",
    "SearchSpace",
    "SearchStudy",
    "Standing",
    "StoredStudy",
    "TrialRecord",
    "alike_behind",
    "by_score",
    "changes",
    "check_rule",
    "check_storage",
    "crowded_bounds",
    "foretold",
    "importances",
    "keep_run",
    "knee",
    "notable_trials",
    "meeting",
    "open_storage",
    "pareto_front",
    "pick",
    "promotes",
    "quiet_optuna",
    "rank_correlation",
    "read_study",
    "serve",
    "spread",
    "storage_for_reading",
    "stored_batch_size",
    "without_password",
]
