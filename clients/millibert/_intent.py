"""Intents as an application asks for them."""

from __future__ import annotations

from types import TracebackType
from typing import Self, Unpack

from millibert._asking import DEFAULT_TIMEOUT, ClientOptions
from millibert._connect import connect
from millibert._types import Prediction

_INTENTS = 3


class IntentClassifier:
    """What a customer wants: `IntentClassifier("grpc://127.0.0.1:8001", "banking77").classify_intent(sentence)`.

    Takes what `connect` takes. `client` is the client behind it, for everything else.
    """

    def __init__(
        self, url: str, model: str, timeout: float = DEFAULT_TIMEOUT, **options: Unpack[ClientOptions]
    ) -> None:
        self.client = connect(url, model, timeout, **options)

    def classify_intent(self, text: str, top_k: int = _INTENTS) -> tuple[Prediction, ...]:
        """The likeliest intents of a sentence, best first; raises `ServiceError`."""
        return self.client.classify(text, top_k).predictions

    def close(self) -> None:
        """Close the client."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
