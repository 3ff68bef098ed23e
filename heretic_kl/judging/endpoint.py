"""A model behind an OpenAI-compatible server: requests, retries, timeouts. Reads no answers.

The key goes into one header of requests to one address. Redirects are not followed, and nothing
that is raised or returned here holds the key; only a server's own words on a request that it does
not take can hold parts of that request.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from heretic_kl.errors import ConfigError, HereticKLError

if TYPE_CHECKING:
    import httpx2 as httpx

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_PAUSE: Final = 60.0
"""Seconds between two requests; a server that asks for more is not waited for."""
LARGEST_REPLY: Final = 1 << 20
"""Bytes of a reply that are read."""
WRONG_SETTINGS: Final = frozenset({*range(300, 400), 401, 402, 403, 404, 405})
"""Statuses that every further request would get, too."""
PASSING: Final = frozenset({408, 409, 425, 429})
"""Statuses that another request may not get, besides those from 500 on."""


@dataclass(frozen=True)
class Pace:
    """How patiently an endpoint is asked."""

    timeout: float = 60.0
    """Seconds for one request, all in all."""
    retries: int = 4
    concurrency: int = 8
    """Requests at the same time."""
    first_pause: float = 0.5
    """Seconds before the first retry; doubled with each further one, less a random part."""


class Connection(NamedTuple):
    """What requests of one call share."""

    client: httpx.Client
    stop: threading.Event
    """Set once no further request is of use."""


class Reply(NamedTuple):
    """What one request gave."""

    content: bytes = b""
    """The body, where the status is 200."""
    problem: str = ""
    """Why it is of no use; holds nothing of request and body."""
    pause: float | None = None
    """Seconds to wait at least before asking again; None: asking again is of no use."""
    timed_out: bool = False
    reason: str = ""
    """What the server says of a request that it does not take, without the key."""


@dataclass(frozen=True)
class ServedModel:
    """A model of a server. Subclasses say what it is asked."""

    url: str
    """Base address, such as `http://localhost:8000/v1`."""
    model: str
    key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as `temperature`."""
    pace: Pace = Pace()

    role: ClassVar[str] = "model"
    failure: ClassVar[type[HereticKLError]] = HereticKLError
    """What is raised where every further request would fail."""
    hints: ClassVar[tuple[str, str]] = ("check the key", "check address and model")

    @property
    def name(self) -> str:
        """Model and address."""
        return f"{self.model} at {self.url}"

    def each(
        self, items: Sequence[Item], ask: Callable[[Connection, Item], Result]
    ) -> list[Result]:
        """What `ask` gives for each item, in order; several at the same time."""
        httpx = _http_library()
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        limits = httpx.Limits(max_connections=self.pace.concurrency)
        with httpx.Client(headers=headers, timeout=self.pace.timeout, limits=limits) as client:
            connection = Connection(client, threading.Event())
            pool = ThreadPoolExecutor(self.pace.concurrency, thread_name_prefix=self.role)
            try:
                return list(pool.map(lambda item: ask(connection, item), items))
            finally:  # where one raises, the others end with the request that they are in
                connection.stop.set()
                pool.shutdown(cancel_futures=True)

    def may_retry(self, connection: Connection, attempt: int, pause: float | None) -> bool:
        """Wait before asking again; False: no further request is due."""
        if pause is None or attempt == self.pace.retries:
            return False
        longest = min(LONGEST_PAUSE, self.pace.first_pause * 2**attempt)
        return not connection.stop.wait(max(pause, longest * random.uniform(0.5, 1)))

    def send(
        self,
        connection: Connection,
        path: str,
        request: Mapping[str, Any] | None = None,
        largest: int = LARGEST_REPLY,
    ) -> Reply:
        """One request; without a body, a GET.

        Args:
            connection: see `each`.
            path: below the base address.
            request: `model` and `body` are added.
            largest: bytes of a reply that are read.

        Raises:
            HereticKLError: `failure`, where every further one would fail in the same way.
        """
        httpx = _http_library()
        method, url = "GET", f"{self.url.rstrip('/')}/{path}"
        if request is not None:
            method, request = "POST", {"model": self.model, **request, **self.body}
        deadline = time.monotonic() + self.pace.timeout
        content = bytearray()
        try:
            with connection.client.stream(method, url, json=request) as response:
                for part in response.iter_bytes():
                    content += part
                    if len(content) > largest:
                        return Reply(problem=f"a reply of more than {largest} bytes")
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("")
        except httpx.TimeoutException:
            problem = f"no reply within {self.pace.timeout:g} s"
            return Reply(problem=problem, pause=0.0, timed_out=True)
        except httpx.TransportError as error:
            return Reply(problem=f"no connection ({type(error).__name__})", pause=0.0)
        except httpx.DecodingError:
            return Reply(problem="a malformed reply", pause=0.0)
        if response.status_code == 200:
            return Reply(bytes(content))
        return self._refused(response.status_code, response.headers, bytes(content))

    def _refused(self, status: int, headers: Mapping[str, str], content: bytes) -> Reply:
        reason = self._reason(content)
        if status in WRONG_SETTINGS:
            hint = self.hints[status not in (401, 402, 403)]
            text = f" ({reason}): {hint}" if reason else f": {hint}"
            if 300 <= status < 400:
                text = ": it redirects, which is not followed; set the address that it leads to"
            raise self.failure(f"{self.role} {self.name}: HTTP {status}{text}")
        problem = f"HTTP {status}"
        if status < 500 and status not in PASSING:
            return Reply(problem=problem, reason=reason)
        pause = _asked_pause(headers.get("Retry-After", ""))
        if pause > LONGEST_PAUSE:
            return Reply(problem=f"{problem}, which asks to wait {pause:.0f} s")
        return Reply(problem=problem, pause=pause)

    def _reason(self, content: bytes) -> str:
        """What the server says, if anything, without the key."""
        try:
            error = json.loads(content)["error"]
            said = error["message"] if isinstance(error, dict) else error
        except (ValueError, LookupError, TypeError, RecursionError):
            said = ""
        text = said if isinstance(said, str) else ""
        text = text if self.key is None else text.replace(self.key, "***")
        return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())[:200]


def _asked_pause(header: str) -> float:
    """Seconds that a Retry-After header names, as a number or a date; 0 where it names none."""
    try:
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header.strip()):
            return float(header)
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def endpoint_problem(url: str) -> str | None:
    """What is wrong with a base address, without quoting it where it may hold a secret."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is no address: write it like http://localhost:8000/v1"
    if "@" in parts.netloc or parts.query or parts.fragment:
        return "holds a user, a password, ? or #: a key belongs into an environment variable"
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        return f"= {url!r} is no address: write it like http://localhost:8000/v1"
    beyond = re.search(r"/(chat/)?completions$", parts.path.rstrip("/"))
    if beyond is not None:
        return f"= {url!r} goes too far: leave out {beyond[0]}"
    return None


def read_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        ConfigError: there is none, or it can be no key; a value is never quoted.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ConfigError(
            "key_variable is the name of an environment variable (capitals, digits and _), not the "
            "key itself"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"key_variable = {variable!r}: this environment variable is not set")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(
            f"key_variable = {variable!r}: its value holds blanks or characters beyond ASCII, "
            "which no key does"
        )
    return key


def _http_library() -> Any:
    """The hub client's own HTTP client: httpx2, or its predecessor on Python 3.10."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        import httpx

        return httpx
