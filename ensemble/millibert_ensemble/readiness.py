"""What a model repository serves, and the proof that it is served: a real request through each service.

Triton's own `ready` says that models are loaded, not that they answer.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from millibert._errors import ServerFault, UsageError
from millibert_ensemble import contract

_ADVICE = "make one with `millibert build`"
_PROOF = "Is anybody there?"
# A loaded service answers in milliseconds; its first request may still compile something.
_ANSWER_SECONDS = 120.0


def services(repository: Path) -> list[str]:
    """Return the names of the services (what takes texts and answers labels) in a model repository.

    Raises UsageError when there is no such repository or no service in it.
    """
    if not repository.is_dir():
        raise UsageError(f"no model repository at {repository}: no such folder; {_ADVICE}")
    configs = {path.parent.name: _parse(path) for path in sorted(repository.glob("*/config.pbtxt"))}
    if not configs:
        raise UsageError(f"the model repository {repository} is empty: no MODEL/config.pbtxt; {_ADVICE}")
    steps = {step.model_name for config in configs.values() for step in config.ensemble_scheduling.step}
    found = [name for name, config in configs.items() if _classifies(config) and name not in steps]
    if not found:
        names = ", ".join(configs)
        raise UsageError(
            f"the model repository {repository} holds no service, only {names}: none takes {contract.TEXT.name} "
            f"and answers {contract.LABEL.name}; {_ADVICE}"
        )
    return found


def is_loaded(host: str, port: int) -> bool:
    """Return whether Triton's HTTP endpoint says that all models are loaded."""
    try:
        status, _ = _ask(host, port, "GET", "/v2/health/ready")
    except (OSError, http.client.HTTPException):
        return False
    return status == http.client.OK


def prove(host: str, port: int, names: Sequence[str]) -> None:
    """Send a text through each service; ServerFault with Triton's reason when one does not answer."""
    for name in names:
        try:
            status, body = ask_service(host, port, name, _ANSWER_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            status, body = 0, str(error) or type(error).__name__
        if status != http.client.OK:
            reason = f"it is loaded but does not answer: {body}"
            raise ServerFault(reason, endpoint=f"http://{host}:{port}", model=name)


def ask_service(host: str, port: int, name: str, seconds: float) -> tuple[int, str]:
    """Send a text through a service: HTTP status and body, or TimeoutError, another OSError or an HTTPException."""
    tensor = contract.TEXT
    text = {"name": tensor.name, "datatype": tensor.datatype, "shape": [1, *tensor.shape], "data": [_PROOF]}
    return _ask(host, port, "POST", f"/v2/models/{name}/infer", json.dumps({"inputs": [text]}), seconds)


def _parse(path: Path) -> model_config_pb2.ModelConfig:
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a Triton model configuration: {error}") from error


def _classifies(config: model_config_pb2.ModelConfig) -> bool:
    taken = [tensor.name for tensor in config.input]
    expected = [tensor.name for tensor in contract.REQUEST_TENSORS]
    return taken == expected and contract.LABEL.name in [tensor.name for tensor in config.output]


def _ask(
    host: str, port: int, method: str, path: str, body: str | None = None, seconds: float = _ANSWER_SECONDS
) -> tuple[int, str]:
    # A connection of its own, closed at once: idle ones would hold up the server's drain.
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
