"""Asking the hub: the person's token, and errors in one line that never hold it."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from heretic_kl.errors import HereticKLError, UploadError, innermost, plain_line
from heretic_kl.files import TOKENS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def hub_token() -> str:
    """The token that the hub's own programs use: HF_TOKEN, or that of `hf auth login`.

    Raises:
        UploadError: there is none; says how to log in.
    """
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # an exchange of tokens that a CI was told to make
        raise UploadError(f"no token for the hub: {hidden(innermost(error), '')}") from None
    if token is None:
        raise UploadError(f"not logged in to the hub: {LOG_IN}")
    return token


def writing_token(endpoint: str) -> str:
    """What to do about a token that may not write."""
    return f"make one that writes at {endpoint}/settings/tokens"


def hub_client(token: str) -> HfApi:
    """The hub at HF_ENDPOINT, asked with a token."""
    from huggingface_hub import HfApi

    return HfApi(token=token)


@contextmanager
def one_line_errors(api: HfApi) -> Iterator[None]:
    """Turn whatever the hub's client raises into an `UploadError` without the token.

    Raises:
        UploadError: in place of any other error; has no cause, whose traceback might hold the
            token.
    """
    try:
        yield
    except HereticKLError:
        raise
    except Exception as error:  # whatever the clients for HTTP and Xet of this version raise
        raise UploadError(hidden(_reason(error, api.endpoint), str(api.token))) from None


def hidden(text: str, token: str) -> str:
    """The text on one line, fit to be shown, this token and whatever looks like one blotted out."""
    words = " ".join(text.split())
    if token:
        words = words.replace(token, "***")
    words = TOKENS.sub("***", re.sub(r"(?i)\b(bearer)\s+[^\s'\"]+", r"\1 ***", words))
    return plain_line(words)


@contextmanager
def quiet_client(*, bars: bool, notify: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep what the hub's client logs and warns of off the terminal, and, without `bars`, progress.

    Args:
        bars: leave progress as it is.
        notify: told what the client warns people of; None: nobody is.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("huggingface_hub")
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # what is meant for people
        if not bars and not are_progress_bars_disabled():
            disable_progress_bars()
            stack.callback(enable_progress_bars)
        yield
        if notify is not None:
            for warning in caught:
                notify(hidden(str(warning.message), ""))


def _reason(error: Exception, endpoint: str) -> str:
    """What went wrong and what to do, perhaps on several lines."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids asking the hub: unset it"
    if isinstance(error, json.JSONDecodeError):
        return f"no hub answers at {endpoint}: what came is no JSON"
    if isinstance(error, ValueError):  # what the client found wrong by itself
        return str(error)
    answer = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    if answer is None:
        return f"asking the hub at {endpoint} failed: {innermost(error)}"
    status = answer.response.status_code
    said = answer.server_message or (str(answer).strip().splitlines() or [""])[0]
    if status == 401:
        return f"the hub does not accept the token ({said}): {LOG_IN}"
    if status == 403:
        return f"the token may not do this ({said}): {writing_token(endpoint)}"
    return f"the hub answered {status}: {said}"
