"""Retries, their budget, and which endpoint is next; no sockets, and time as the test wants it."""

from __future__ import annotations

from typing import Any

import pytest

import millibert
from millibert import Retry, _endpoints
from millibert._address import parse_target
from millibert._endpoints import Endpoint, Endpoints
from millibert._retry import Budget


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_endpoints, "time", clock)
    return clock


def next_hosts(endpoints: Endpoints, count: int) -> list[str]:
    chosen = [endpoints.choose() for _ in range(count)]
    return [each.address.host for each in chosen if each is not None]


def named(endpoints: Endpoints, host: str) -> Endpoint:
    (found,) = [each for each in endpoints.known() if each.address.host == host]
    return found


def test_pauses_grow_and_are_drawn() -> None:
    retry = Retry(pause_seconds=0.1, longest_pause_seconds=0.5)
    for attempt, most in ((1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5), (50, 0.5)):
        drawn = [retry.pause(attempt) for _ in range(200)]
        assert 0 <= min(drawn) < 0.3 * most
        assert 0.7 * most < max(drawn) <= most


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"attempts": True}, {"pause_seconds": -1}, {"budget": "x"}])
def test_retry_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(millibert.UsageError, match=next(iter(wrong))):
        Retry(**wrong)


def test_the_budget_is_spent_and_earned() -> None:
    budget = Budget(Retry(budget=2, budget_ratio=0.25))
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.answered()
    assert [budget.take(), budget.take()] == [True, False]
    for _ in range(100):
        budget.answered()
    assert [budget.take() for _ in range(3)] == [True, True, False]


def test_endpoints_take_turns(clock: Clock) -> None:
    endpoints = Endpoints(parse_target("grpc://a,b,c"))
    hosts = next_hosts(endpoints, 9)
    assert sorted(hosts[:3]) == ["a", "b", "c"]
    assert hosts == hosts[:3] * 3


def test_a_dead_endpoint_is_put_aside_tried_by_one_and_taken_back(clock: Clock) -> None:
    endpoints = Endpoints(parse_target("grpc://a,b"))
    dead = named(endpoints, "a")
    endpoints.failed(dead, connected=False)
    assert set(next_hosts(endpoints, 10)) == {"b"}
    clock.now += 0.7  # half a second and its jitter
    assert next_hosts(endpoints, 10).count("a") == 1, "one call alone finds out"
    endpoints.failed(dead, connected=False)
    clock.now += 0.7
    assert set(next_hosts(endpoints, 10)) == {"b"}, "the second time it is longer"
    clock.now += 0.7
    assert "a" in next_hosts(endpoints, 2)
    endpoints.answered(dead)
    assert next_hosts(endpoints, 10).count("a") == 5


def test_an_endpoint_that_hangs_up_has_three_chances(clock: Clock) -> None:
    endpoints = Endpoints(parse_target("grpc://a,b"))
    for _ in range(2):
        endpoints.failed(named(endpoints, "a"), connected=True)
        assert "a" in next_hosts(endpoints, 2)
        clock.now += 15
    endpoints.failed(named(endpoints, "a"), connected=True)
    assert set(next_hosts(endpoints, 4)) == {"b"}


def test_when_all_are_aside_the_one_that_is_back_first_is_asked(clock: Clock) -> None:
    endpoints = Endpoints(parse_target("grpc://a,b"))
    for host, failures in (("a", 5), ("b", 1)):
        for _ in range(failures):
            endpoints.failed(named(endpoints, host), connected=False)
    assert next_hosts(endpoints, 3) == ["b", "b", "b"]
    chosen = endpoints.choose([named(endpoints, "b")])
    assert chosen is named(endpoints, "a"), "what this call has tried is tried last"


def test_names_are_looked_up_by_one_caller_and_again_after_a_failure(clock: Clock) -> None:
    target = parse_target("dns:///service:8001")
    endpoints = Endpoints(target)
    assert endpoints.choose() is None
    assert endpoints.to_resolve() == target.addresses

    def found(*hosts: str) -> None:
        endpoints.resolved([(target.addresses[0]._replace(host=host), "service") for host in hosts])

    found("10.0.0.1", "10.0.0.2", "10.0.0.1")
    assert endpoints.to_resolve() == ()
    first = named(endpoints, "10.0.0.1")
    assert (str(first), first.name) == ("grpc://10.0.0.1:8001", "service")
    clock.now += 0.1
    endpoints.failed(first, connected=False)
    assert endpoints.to_resolve() == ()
    clock.now += 1.0
    assert endpoints.to_resolve() == target.addresses
    found("10.0.0.1", "10.0.0.3")
    assert named(endpoints, "10.0.0.1") is first, "what is known keeps its history"
    assert {each.address.host for each in endpoints.known()} == {"10.0.0.1", "10.0.0.3"}
    clock.now += 9.9
    assert endpoints.to_resolve() == ()
    clock.now += 0.2
    assert endpoints.to_resolve() == target.addresses
