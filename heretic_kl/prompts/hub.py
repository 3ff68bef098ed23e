"""Whether the hub gives a dataset, found out in seconds and quietly. Reads no prompts."""

import difflib
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from heretic_kl.errors import innermost

HUB_TIMEOUT_SECONDS = 5.0
COMMIT = "[0-9a-f]{40}"
commits: dict[tuple[str, str | None], str] = {}
"""Name of a hub dataset and revision asked for -> the commit that this process read."""


def hub_reachable(dataset_ids: Sequence[str], timeout: float = HUB_TIMEOUT_SECONDS) -> bool:
    """Whether each dataset is in the local cache or can be had from the hub; in seconds."""
    missing = [name for name in dataset_ids if not is_cached(name)]
    return hub_problem(missing, timeout) is None


def is_cached(name: str) -> bool:
    """Whether `datasets` has prepared this dataset before, so that it needs no hub."""
    return bool(prepared(name))


def prepared(name: str, commit: str = "*") -> list[Path]:
    """Folders SUBSET/VERSION/COMMIT of what `datasets` has in its cache of a dataset."""
    with quiet_datasets():
        import datasets
        from datasets.naming import camelcase_to_snakecase

        owner, slash, title = name.rpartition("/")
        folder = f"{owner}{'___' if slash else ''}{camelcase_to_snakecase(title)}"
        cache = Path(datasets.config.HF_DATASETS_CACHE) / folder
    return [path.parent for path in cache.glob(f"*/*/{commit}/dataset_info.json")]


def dataset_revision(name: str, revision: str | None = None) -> str | None:
    """The commit of a hub dataset that this process read; None: it read no such dataset."""
    return commits.get((name, revision))


def commit_of(name: str, revision: str) -> str | None:
    """The commit that a revision of a dataset is on the hub now."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha


def hub_problem(names: Sequence[str], timeout: float) -> str | None:
    """Return why the hub will not give these datasets, within `timeout` seconds; None: it will.

    A name may be `NAME@REVISION`.
    """
    if not names:
        return None
    responses: list[str | None] = []

    def ask() -> None:
        responses.append(_ask_hub(names, timeout))

    # In a thread, because a name look-up that hangs obeys no timeout of the HTTP client.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return responses[0] if responses else f"the hub did not answer within {timeout:g} seconds"


def _ask_hub(names: Sequence[str], timeout: float) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for name, _, revision in (pinned.partition("@") for pinned in names):
        try:
            HfApi().dataset_info(name, revision=revision or None, timeout=timeout)
        except RevisionNotFoundError:
            return f"no revision {revision!r} on the hub"
        except GatedRepoError:
            return "gated on the hub: accept its terms there, then log in with `hf auth login`"
        except (RepositoryNotFoundError, HFValidationError):
            return (
                f"no such file or folder{nearest_file(Path(name))}, and no such dataset on the hub"
            )
        except OfflineModeIsEnabled:
            return "not in the local cache, and HF_HUB_OFFLINE forbids asking the hub"
        except Exception as error:  # whatever the HTTP client of this version raises
            return f"no such file or folder, and the hub cannot be reached: {innermost(error)}"
    return None


@contextmanager
def offline() -> Iterator[None]:
    """Keep `datasets` and the hub's client from asking the hub."""
    import datasets
    from huggingface_hub import constants

    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep progress bars, warnings and log lines of `datasets` and the hub off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        from huggingface_hub.utils.tqdm import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "fsspec")]
        levels = [logger.level for logger in loggers]
        datasets_bars = not datasets.are_progress_bars_disabled()
        hub_bars = not are_progress_bars_disabled()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if datasets_bars:
                datasets.enable_progress_bars()
            if hub_bars:
                enable_progress_bars()


def nearest_file(path: Path) -> str:
    """Return a hint at the file or folder with the nearest name, if there is one."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.with_name(nearest[0])}?)" if nearest else ""
