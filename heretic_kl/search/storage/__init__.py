"""Where a study is kept, and how several processes share it. Knows nothing about models."""

from heretic_kl.search.storage.artifacts import PlanStore, ReferenceStore
from heretic_kl.search.storage.backends import (
    JOURNAL_SUFFIX,
    check_storage,
    open_storage,
    serve,
    storage_for_reading,
    study_names,
    without_password,
)
from heretic_kl.search.storage.lease import Heartbeat, Watch, lease_attributes
from heretic_kl.search.storage.roles import Roles

__all__ = [
    "JOURNAL_SUFFIX",
    "Heartbeat",
    "PlanStore",
    "ReferenceStore",
    "Roles",
    "Watch",
    "check_storage",
    "lease_attributes",
    "open_storage",
    "serve",
    "storage_for_reading",
    "study_names",
    "without_password",
]
