"""A chat model behind an OpenAI-compatible server, as a judge.

The key goes into one header of requests to one address. Redirects are not followed, and nothing
that is raised or returned here holds the key, a response or an answer.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from heretic_kl.errors import ConfigError, ScorerError
from heretic_kl.judging.judgement import Judgement, Pair, Verdict
from heretic_kl.judging.question import Question

if TYPE_CHECKING:
    import httpx2 as httpx

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


@dataclass(frozen=True)
class ChatEndpoint:
    """A model of a server; see `heretic_kl.judging.ResponseJudge`."""

    url: str
    """Base address, such as `http://localhost:8000/v1`."""
    model: str
    key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as `temperature`."""
    pace: Pace = Pace()

    @property
    def name(self) -> str:
        """Model and address."""
        return f"{self.model} at {self.url}"

    @property
    def identity(self) -> str:
        """Nothing is known of the model but its name."""
        return self.name

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `ResponseJudge.judge`; several requests at the same time.

        Raises:
            ScorerError: the server does not take the key, the model or the address.
        """
        httpx = _http_library()
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        limits = httpx.Limits(max_connections=self.pace.concurrency)
        stop = threading.Event()
        with httpx.Client(headers=headers, timeout=self.pace.timeout, limits=limits) as client:
            pool = ThreadPoolExecutor(self.pace.concurrency, thread_name_prefix="judge")
            try:
                return list(pool.map(lambda pair: self._judged(client, stop, *pair), pairs))
            finally:  # where one raises, the others end with the request that they are in
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _judged(self, client: httpx.Client, stop: threading.Event, *pair: Any) -> Judgement:
        """One response, asked about until there is a verdict or no retry is left."""
        question = Question(*pair)
        judgement = Judgement(None)
        for attempt in range(self.pace.retries + 1):
            reply = self._asked(client, question)
            judgement = Judgement(
                reply.verdict,
                reply.problem,
                judgement.requests + 1,
                judgement.timeouts + reply.timed_out,
                judgement.prompt_tokens + reply.prompt_tokens,
                judgement.answer_tokens + reply.answer_tokens,
            )
            if reply.pause is None or attempt == self.pace.retries:
                break
            longest = min(LONGEST_PAUSE, self.pace.first_pause * 2**attempt)
            if stop.wait(max(reply.pause, longest * random.uniform(0.5, 1))):
                break
        return judgement

    def _asked(self, client: httpx.Client, question: Question) -> _Reply:
        """One request.

        Raises:
            ScorerError: every further one would fail in the same way.
        """
        httpx = _http_library()
        message = {"role": "user", "content": question.text}
        request = {"model": self.model, "messages": [message], **self.body}
        deadline = time.monotonic() + self.pace.timeout
        content = b""
        try:
            url = f"{self.url.rstrip('/')}/chat/completions"
            with client.stream("POST", url, json=request) as response:
                for part in response.iter_bytes():
                    content += part
                    if len(content) > LARGEST_REPLY:
                        return _Reply(problem=f"a reply of more than {LARGEST_REPLY} bytes")
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("")
        except httpx.TimeoutException:
            problem = f"no reply within {self.pace.timeout:g} s"
            return _Reply(problem=problem, pause=0.0, timed_out=True)
        except httpx.TransportError as error:
            return _Reply(problem=f"no connection ({type(error).__name__})", pause=0.0)
        except httpx.DecodingError:
            return _Reply(problem="a malformed reply", pause=0.0)
        if response.status_code == 200:
            return _read(content, question)
        return self._refused(response.status_code, response.headers, content)

    def _refused(self, status: int, headers: Mapping[str, str], content: bytes) -> _Reply:
        if status in WRONG_SETTINGS:
            raise ScorerError(f"judge {self.name}: HTTP {status}{self._reason(status, content)}")
        problem = f"HTTP {status}"
        if status < 500 and status not in PASSING:
            return _Reply(problem=problem)
        pause = _asked_pause(headers.get("Retry-After", ""))
        if pause > LONGEST_PAUSE:
            return _Reply(problem=f"{problem}, which asks to wait {pause:.0f} s")
        return _Reply(problem=problem, pause=pause)

    def _reason(self, status: int, content: bytes) -> str:
        """What the server says, if anything, without the key; and what to look at."""
        if 300 <= status < 400:
            return ": it redirects, which is not followed; set the address that it leads to"
        try:
            error = json.loads(content)["error"]
            said = error["message"] if isinstance(error, dict) else error
        except (ValueError, LookupError, TypeError, RecursionError):
            said = ""
        text = said if isinstance(said, str) else ""
        text = text if self.key is None else text.replace(self.key, "***")
        text = " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())[:200]
        hint = "check key_variable" if status in (401, 402, 403) else "check endpoint and model"
        return f" ({text}): {hint}" if text else f": {hint}"


class _Reply(NamedTuple):
    """What one request gave."""

    verdict: Verdict | None = None
    problem: str = ""
    pause: float | None = None
    """Seconds to wait at least before asking again; None: asking again is of no use."""
    timed_out: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0


def _read(content: bytes, question: Question) -> _Reply:
    """A verdict from the body of a reply with status 200."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        answer = choice["message"]["content"]
        usage = reply.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return _Reply(problem="a malformed reply", pause=0.0)
    counts = usage if isinstance(usage, dict) else {}
    paid = _Reply(
        prompt_tokens=_count(counts.get("prompt_tokens")),
        answer_tokens=_count(counts.get("completion_tokens")),
    )
    verdict = question.verdict(answer) if isinstance(answer, str) else None
    if verdict is not None:
        return paid._replace(verdict=verdict)
    cut = isinstance(choice, dict) and choice.get("finish_reason") == "length"
    problem = "an answer cut by max_tokens" if cut else "an answer that is no verdict"
    return paid._replace(problem=problem, pause=0.0)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


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
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return f"= {url!r} goes too far: leave out /chat/completions"
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
