"""The engine's own counters on a metrics endpoint: tokens that it has worked on."""

from __future__ import annotations

import http.client
import re
from urllib.parse import urlsplit

from millibert._errors import ServerFault, Unavailable

_EVERY_MODEL = "*"
_TOKENS = re.compile(r'^millibert_tokens_total\{kind="(\w+)"\} (\S+)$', re.MULTILINE)
TOKEN_KINDS = ("text", "computed")
"""The values of the counters' label."""


def read_tokens(metrics_url: str, timeout: float) -> dict[str, float]:
    """Tokens the engine has worked on, by kind, from a metrics endpoint; empty where its engine does not count them.

    Raises `Unavailable` where it cannot be reached and `ServerFault` where it refuses.
    """
    split = urlsplit(metrics_url)
    connection = http.client.HTTPConnection(split.netloc, timeout=timeout)
    try:
        connection.request("GET", split.path or "/metrics")
        answer = connection.getresponse()
        status, body = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "strerror", None) or repr(error)
        raise Unavailable(f"cannot reach the server: {cause}", endpoint=metrics_url, model=_EVERY_MODEL) from error
    finally:
        connection.close()
    if status != http.client.OK:
        raise ServerFault(f"HTTP {status}; is this the metrics port?", endpoint=metrics_url, model=_EVERY_MODEL)
    return {kind: float(value) for kind, value in _TOKENS.findall(body.decode("utf-8", "replace"))}
