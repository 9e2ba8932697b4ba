"""Checks of rendered overlays, and what shows that each of them can fail.

INVARIANTS = Invariants()

@INVARIANTS.check
def services_have_ports(rendered):
    ...                                        # yields what is wrong

test_it_holds = INVARIANTS.hold()
test_it_can_fail = INVARIANTS.can_fail({"prod-cpu": {services_have_ports: [changed("Service", "spec/ports", [])]}})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.manifests import SUBJECTS, Rendered, render_subject

Check = Callable[[Rendered], Iterator[str]]
Breakage = Callable[[Rendered], object]


class Invariants:
    """Checks of a rendered overlay, and the tests of them.

    A check yields what is wrong, in words. What breaks it changes a copy of an overlay in place.
    """

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def check(self, function: Check) -> Check:
        """Register a check (decorator)."""
        self.checks.append(function)
        return function

    def hold(self) -> Callable[..., None]:
        """Return the test of every overlay and stack."""

        @pytest.mark.parametrize("subject", SUBJECTS)
        @pytest.mark.parametrize("check", self.checks, ids=_name)
        def test(check: Check, subject: str) -> None:
            problems = list(check(render_subject(subject)))
            assert not problems, "\n".join(problems)

        return test

    def can_fail(self, breakages: dict[str, dict[Check, list[Breakage]]]) -> Callable[..., None]:
        """Return the test of the checks themselves: each notices what breaks it, in copies of these subjects."""

        @pytest.mark.parametrize("check", self.checks, ids=_name)
        def test(check: Check) -> None:
            changes = [(subject, change) for subject, them in breakages.items() for change in them.get(check, ())]
            assert changes
            for number, (subject, change) in enumerate(changes):
                broken = render_subject(subject).mutated(change)
                assert list(check(broken)), f"breakage {number} goes unnoticed"

        return test


def changed(kind: str, path: str, value: object) -> Breakage:
    """Return what changes a field of the first object of a kind; `path` is like `spec/ports/0/port`."""

    def change(rendered: Rendered) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
        place = rendered.of(kind)[0]
        for part in parents:
            place = place[part]
        place[last] = value

    return change


def without(kind: str) -> Breakage:
    def change(rendered: Rendered) -> None:
        rendered.documents = [it for it in rendered.documents if it["kind"] != kind]

    return change


def _name(check: Check) -> str:
    return check.__name__
