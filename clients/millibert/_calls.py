"""Everything that can be asked of a service, as steps: see `_asking` for what a step is and who carries it out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from millibert._asking import Asking, Pause, Question, Steps, Texts
from millibert._codec import (
    Outputs,
    Request,
    batch_limit_in,
    check_threshold,
    decode,
    encode,
    region_is_unknown,
)
from millibert._documents import Config, read_config, read_models, read_server, read_statistics
from millibert._endpoints import Endpoint
from millibert._errors import (
    Busy,
    InvalidRequest,
    NotFound,
    ServerFault,
    ServiceError,
    Timeout,
    Unavailable,
)
from millibert._protocol import Exchange
from millibert._shared_memory import SMALLEST_BYTES, Region, Regions, abandoned, make_region, serialized
from millibert._statistics import Counters
from millibert._types import Classification, ModelState, ServerInfo

T = TypeVar("T")

_READY_AGAIN_SECONDS = 0.2
_log = logging.getLogger("millibert")


class Calls(Asking):
    """Every call of a client, written once for threads and asyncio."""

    # What can be asked.

    def _classify(
        self,
        texts: Texts,
        top_k: int | None,
        threshold: float | None,
        timeout: float | None,
        request_id: str | None,
    ) -> Steps[Any]:
        count = 1 if isinstance(texts, str) else len(texts) if hasattr(texts, "__len__") else 0
        with self._asking("classify", timeout, request_id, count) as question:
            with self._blaming_the_caller(question):
                request = encode([texts] if isinstance(texts, str) else texts, top_k)
                above = check_threshold(threshold)
            answers: list[Classification] = []
            while len(answers) < len(request.texts):
                part = request.part(len(answers), self._end_of_part(len(answers), len(request.texts)))
                try:
                    outputs = yield from self._infer(question, part)
                except InvalidRequest as error:
                    limit = batch_limit_in(error.reason)
                    if limit is None or limit >= len(part.texts):
                        raise
                    self._batch_limit = limit  # the server's own word: from now on requests are cut to it
                    continue
                with self._blaming_the_server(question):
                    answers += decode(part.texts, outputs, above)
        return answers[0] if isinstance(texts, str) else tuple(answers)

    def _end_of_part(self, start: int, count: int) -> int:
        return count if self._batch_limit is None else min(count, start + self._batch_limit)

    def _is_ready(self, timeout: float | None) -> Steps[bool]:
        try:
            with self._asking("ready", timeout) as question:
                if not (yield from self._ask(question, self.protocol.server_ready(), patient=False)):
                    return False
                return bool((yield from self._ask(question, self.protocol.model_ready(self.model), patient=False)))
        except (NotFound, Busy, Timeout, Unavailable):
            return False

    def _wait_until_ready(self, timeout: float) -> Steps[None]:
        with self._asking("wait_until_ready", timeout) as question:
            while (left := question.left()) > 0:
                if (yield from self._is_ready(left)):
                    return
                yield Pause(min(_READY_AGAIN_SECONDS, max(0.0, question.left())))
            raise self._error(Timeout, f"not ready within {question.seconds:g} s", question)

    def _config(self, timeout: float | None) -> Steps[Config]:
        return self._document("config", self.protocol.config(self.model), read_config, timeout)

    def _configuration(self, model: str | None, timeout: float | None) -> Steps[dict[str, Any]]:
        return self._document("config", self.protocol.config(model or self.model), dict, timeout)

    def _max_batch_size(self, timeout: float | None) -> Steps[int]:
        return (yield from self._config(timeout)).max_batch_size

    def _labels(self, timeout: float | None) -> Steps[tuple[str, ...]]:
        found = (yield from self._config(timeout)).labels
        if not found:
            reason = "its configuration does not list its labels; built by an older millibert?"
            raise ServerFault(reason, endpoint=str(self.target), model=self.model)
        return found

    def _steps(self, timeout: float | None) -> Steps[tuple[str, ...]]:
        return (yield from self._config(timeout)).steps

    def _statistics(self, timeout: float | None) -> Steps[dict[str, Counters]]:
        return self._document("statistics", self.protocol.statistics(), read_statistics, timeout)

    def _models(self, timeout: float | None) -> Steps[tuple[ModelState, ...]]:
        return self._document("models", self.protocol.models(), read_models, timeout)

    def _server(self, timeout: float | None) -> Steps[ServerInfo]:
        return self._document("server", self.protocol.server(), read_server, timeout)

    def _document(
        self, method: str, exchange: Exchange[Any], read: Callable[[Any], T], timeout: float | None
    ) -> Steps[T]:
        with self._asking(method, timeout) as question:
            document = yield from self._ask(question, exchange)
            with self._blaming_the_server(question):
                return read(document)

    # How it is asked.

    def _infer(self, question: Question, request: Request) -> Steps[Outputs]:
        if self._shared_memory:
            content = serialized(request.tensor)
            if len(content) >= SMALLEST_BYTES:
                return (yield from self._infer_shared(question, request, content))
        return (yield from self._ask(question, self.protocol.infer(self.model, request, question.request_id)))

    # Through shared memory.

    def _infer_shared(self, question: Question, request: Request, content: bytes) -> Steps[Outputs]:
        """As `_infer`; where shared memory does not work out, through the connection."""
        endpoint = yield from self._endpoint(question, ())
        regions = self._regions.setdefault(endpoint, Regions())
        through_connection = self.protocol.infer(self.model, request, question.request_id)
        try:
            region = regions.take(len(content))
            if region is None:
                region = yield from self._new_region(question, endpoint, regions, len(content))
        except (ServiceError, OSError) as error:
            _log.warning("no shared memory with %s, the texts go through the connection: %s", endpoint, error)
            return (yield from self._ask(question, through_connection))
        region.write(content)
        answered = False
        try:
            exchange = self.protocol.infer(self.model, request, question.request_id, region)
            outputs = yield from self._ask(question, exchange, only=endpoint)
            answered = True
        except (InvalidRequest, NotFound, Busy, ServerFault) as error:
            answered = not region_is_unknown(error.reason)
            if answered:
                raise
        except Unavailable:
            _log.info("%s is away, the texts go through the connection", endpoint)
        finally:
            # Without an answer the server may still be reading it.
            (regions.give_back if answered else regions.lose)(region)
        return outputs if answered else (yield from self._ask(question, through_connection))

    def _new_region(self, question: Question, endpoint: Endpoint, regions: Regions, size: int) -> Steps[Region]:
        unused = regions.found()
        if not regions.swept:
            regions.swept = True
            registered = yield from self._ask(question, self.protocol.regions(), only=endpoint)
            unused += filter(abandoned, registered)
        for name in unused:
            yield from self._ask(question, self.protocol.unregister(name), only=endpoint)
        region = make_region(size)
        try:
            yield from self._ask(question, self.protocol.register(region), only=endpoint)
        except BaseException:
            region.close()
            raise
        region.unlink()
        return region

    def _close_regions(self) -> Steps[None]:
        regions, self._regions = self._regions, {}
        for endpoint, each in regions.items():
            for region in each.clear():
                region.close()
                with suppress(ServiceError), self._asking("close", None) as question:
                    yield from self._ask(question, self.protocol.unregister(region.name), only=endpoint)
