"""Two servers are restarted one after the other under constant load, and no call fails."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from tests.clients import FORMS, open_client, protocol
from tests.conftest import CLIENT_REPOSITORY, RunningServer

import millibert
from millibert_ensemble.ports import ANY_PORTS, Ports, reserve

if TYPE_CHECKING:
    Serve = Callable[..., AbstractContextManager[RunningServer]]

THREADS = 8
_PATIENCE_SECONDS = 3
LABELS = {"hello": "greeting", "sleep": "nap", "x": "other"}
WORDS = ("hello", "sleep 0.002", "x")


class Replica:
    """A server that is always started on the same ports."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        _, self.ports = reserve("127.0.0.1", ANY_PORTS)
        self._stack = ExitStack()

    def start(self) -> None:
        options = [f"--{use}-port={port}" for use, port in self.ports._asdict().items()]
        self._running = self._stack.enter_context(self._serve(CLIENT_REPOSITORY, *options))

    def stop(self) -> None:
        """SIGTERM, and wait; again where kept-alive connections would hold Triton up for all of its exit timeout."""
        process = self._running.process
        process.terminate()
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
        self._stack.close()


@pytest.fixture(scope="module")
def replicas(triton: Serve) -> Iterator[list[Replica]]:
    made = [Replica(triton), Replica(triton)]
    try:
        for replica in made:
            replica.start()
        yield made
    finally:
        for replica in made:
            replica.stop()


class Load:
    """Calls without a pause from 8 threads or tasks; keeps every failure and counts the answers."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._stop = threading.Event()
        self._numbers = itertools.count()
        self.answered = 0
        self.wrong: list[str] = []

    def run(self, until_done: Callable[[], None]) -> None:
        """Load the servers as long as the function takes."""
        thread = threading.Thread(target=self._all)
        thread.start()
        try:
            until_done()
        finally:
            self._stop.set()
            thread.join()

    def _all(self) -> None:
        if isinstance(self._client, millibert.Client):
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda _: self._calls(), range(THREADS)))
        else:
            self._client._run(self._tasks())

    def _calls(self) -> None:
        while not self._stop.is_set():
            texts = self._texts()
            try:
                answers = self._client.classify(texts)
            except millibert.ServiceError as error:
                self.wrong.append(str(error))
            else:
                self._check(texts, answers)

    async def _tasks(self) -> None:
        async def calls() -> None:
            while not self._stop.is_set():
                texts = self._texts()
                try:
                    answers = await self._client.client.classify(texts)
                except millibert.ServiceError as error:
                    self.wrong.append(str(error))
                else:
                    self._check(texts, answers)

        await asyncio.gather(*(calls() for _ in range(THREADS)))

    def _texts(self) -> list[str]:
        number = next(self._numbers)
        return [f"{WORDS[(number + place) % 3]} {number}" for place in range(1 + number % 3)]

    def _check(self, texts: list[str], answers: tuple[millibert.Classification, ...]) -> None:
        expected = [(text, LABELS[text.split()[0]]) for text in texts]
        found = [(answer.text, answer.label) for answer in answers]
        if found != expected:
            self.wrong.append(f"{found} for {texts}")
        self.answered += 1


@pytest.mark.e2e
@pytest.mark.parametrize("form", FORMS)
def test_no_call_fails_while_servers_are_restarted(replicas: list[Replica], form: str) -> None:
    counts: list[int] = []

    def restart_all() -> None:
        for replica in replicas:
            time.sleep(0.5)
            replica.stop()
            counts.append(load.answered)
            replica.start()
            counts.append(load.answered)

    scheme = protocol(form)
    urls = [f"{scheme}://127.0.0.1:{_port(replica.ports, scheme)}" for replica in replicas]
    with open_client(form, urls) as client:
        load = Load(client)
        load.run(restart_all)
    assert load.wrong == []
    assert load.answered > 200
    assert all(later > earlier for earlier, later in itertools.pairwise(counts)), "answers came all the time"


def _port(ports: Ports, scheme: str) -> int:
    return ports.grpc if scheme == "grpc" else ports.http
