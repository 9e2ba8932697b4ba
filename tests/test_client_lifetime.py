"""The clients over time: event loops and forks, shared memory, a hundred thousand calls; nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.clients import FORMS, open_client, protocol

import millibert

if TYPE_CHECKING:
    from tests.conftest import RunningServer

MODEL = "echo"
SHARED_MEMORY = Path("/dev/shm")


def url_of(server: RunningServer, form: str) -> str:
    return server.grpc_url if protocol(form) == "grpc" else server.http_url


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Event loops and processes


@pytest.mark.e2e
def test_a_client_serves_one_event_loop_after_another(server: RunningServer) -> None:
    for url in (server.grpc_url, server.http_url):
        client = millibert.connect_async(url, MODEL)
        for _ in range(3):
            assert asyncio.run(client.classify("hello")).label == "greeting"
        asyncio.run(client.close())
    gc.collect()  # the connections of a loop that is over go with it


FORKED = """
import os, sys, asyncio, threading
import millibert
urls = sys.argv[1:]
clients = [millibert.connect(url, "echo", timeout=5) for url in urls]
asynchronous = millibert.connect_async(urls[1], "echo", timeout=5)

def check(who):
    assert [client.classify("hello").label for client in clients] == ["greeting"] * 2, who
    assert asyncio.run(asynchronous.classify("hello")).label == "greeting", who
    print(who, flush=True)

stop = threading.Event()
def load():
    while not stop.is_set():
        for client in clients:
            client.classify("hello")
threads = [threading.Thread(target=load) for _ in range(3)]
check("parent")
for thread in threads: thread.start()
for number in range(3):
    if os.fork() == 0:
        check(f"child {number}")
        os._exit(0)
    _, status = os.wait()
    assert status == 0, status
check("parent again")
stop.set()
for thread in threads: thread.join()

grpc_with_asyncio = millibert.connect_async(urls[0], "echo", timeout=5)
asyncio.run(grpc_with_asyncio.classify("hello"))
if os.fork() == 0:
    assert clients[1].classify("hello").label == "greeting"
    for call in (lambda: clients[0].classify("hello"), lambda: asyncio.run(grpc_with_asyncio.classify("hello"))):
        try:
            call()
        except millibert.UsageError as error:
            print(str(error)[:42], flush=True)
    os._exit(0)
os.wait()
check("parent")
for client in clients: client.close()
"""


@pytest.mark.e2e
def test_a_forked_child_can_use_its_parents_clients(server: RunningServer) -> None:
    command = [sys.executable, "-c", FORKED, server.grpc_url, server.http_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    told = ["gRPC cannot be used in this process: it wa"] * 2
    assert done.stdout.splitlines() == ["parent", "child 0", "child 1", "child 2", "parent again", *told, "parent"]


# Shared memory


def regions(client: Any) -> list[str]:
    """What is registered at the server."""
    question = client.protocol.regions()
    if isinstance(client, millibert.Client):
        with client._asking("regions", 5) as asked:
            found: list[str] = client._run(client._ask(asked, question))
    else:
        with client.client._asking("regions", 5) as asked:
            found = client.runner.run(client.client._run(client.client._ask(asked, question)))
    return found


@pytest.mark.e2e
def test_large_requests_through_shared_memory(form: str, server: RunningServer) -> None:
    with open_client(form, url_of(server, form), shared_memory=True) as client:
        assert client.classify("hello").label == "greeting"
        assert regions(client) == [], "small requests go through the connection"
        for size in (20_000, 60_000, 20_000):
            answers = client.classify([f"{word} {'ü' * size}" for word in ("hello", "sleep 0", "x", "y")])
            assert [answer.label for answer in answers] == ["greeting", "nap", "other", "other"]
            assert [answer.truncated for answer in answers] == [True] * 4
        names = regions(client)
        assert len(names) == 2, "one for each size, used again"
        assert not [path for path in SHARED_MEMORY.iterdir() if path.name in names], "nothing to leave behind"
        with pytest.raises(millibert.ServerFault):
            client.classify(["crash", "x" * 100_000])
        assert client.classify(["x" * 100_000])[0].truncated
        assert list(client.classify_many(["x" * 50_000] * 40))[39].truncated
        with open_client(form, url_of(server, form)) as other:
            client.close()
            assert regions(other) == []


KILLED = """
import os, signal, sys, millibert
client = millibert.connect(sys.argv[1], "echo", shared_memory=True)
client.classify(["x" * 100_000])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.e2e
def test_what_a_killed_client_left_is_cleaned_up_by_the_next(form: str, server: RunningServer) -> None:
    url = url_of(server, form)
    killed = subprocess.run([sys.executable, "-c", KILLED, url], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not list(SHARED_MEMORY.glob("millibert-client-*"))
    with open_client(form, url, shared_memory=True) as client:
        (left,) = regions(client)
        client.classify(["x" * 100_000])
        assert left not in regions(client)
        assert len(regions(client)) == 1


# Nothing grows


def footprint() -> tuple[int, int, float]:
    """File descriptors, threads, and resident MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_nothing_grows_over_a_hundred_thousand_calls(form: str, server: RunningServer) -> None:
    """25,000 with each of the four clients: half of them by several threads or tasks at once."""
    with open_client(form, url_of(server, form)) as client:
        call_many(client, 2_500)
        before = footprint()
        for _ in range(5):
            call_many(client, 5_000)
        after = footprint()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 1
    assert after[2] <= before[2] + 8, "MiB"


def call_many(client: Any, count: int) -> None:
    for _ in range(count // 2):
        assert client.classify("hello").label == "greeting"
    if isinstance(client, millibert.Client):
        with ThreadPoolExecutor(4) as pool:
            assert {answer.label for answer in pool.map(client.classify, ["hello"] * (count // 2))} == {"greeting"}
        return

    async def concurrently() -> None:
        async def some() -> None:
            for _ in range(count // 8):
                assert (await client.client.classify("hello")).label == "greeting"

        await asyncio.gather(*(some() for _ in range(4)))

    client.runner.run(concurrently())


@pytest.mark.e2e
def test_clients_that_come_and_go_leave_nothing(server: RunningServer) -> None:
    def come_and_go() -> None:
        for form in FORMS:
            with open_client(form, url_of(server, form)) as client:
                client.classify("hello")

    come_and_go()
    time.sleep(0.5)
    before = footprint()
    for _ in range(50):
        come_and_go()
    deadline = time.monotonic() + 10
    while footprint()[0] > before[0] + 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # gRPC closes in the background
    after = footprint()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 1
