from __future__ import annotations

import pytest

from load.slo import judge, parse_slo
from millibert import UsageError

FIGURES = {"p99": 24.9, "p50": 3.0, "errors": 0.001, "max": None}


def test_objectives_are_read_in_the_units_people_write() -> None:
    found = parse_slo("p99<25ms, errors<0.1%,p50<3000us,max<1.5s")
    assert {objective.name: objective.limit for objective in found} == pytest.approx(
        {"p99": 25, "errors": 0.001, "p50": 3, "max": 1500}
    )


def test_an_objective_is_written_as_it_is_read() -> None:
    objectives = parse_slo("p99.9<12.5ms,refused<2%,growth<5%")
    assert parse_slo(",".join(map(str, objectives))) == objectives


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one"),
        ("p99", "NAME<LIMIT"),
        ("p99>25ms", "NAME<LIMIT"),
        ("p99<25", "in us, ms or s"),
        ("p99<25%", "in us, ms or s"),
        ("errors<1ms", "in %"),
        ("growth<5MiB", "in %"),
        ("p98<1ms", "there is no figure 'p98'"),
        ("errors<0%", "nothing is below 0"),
        ("p99<1ms,p99<2ms", "limits p99 twice"),
    ],
)
def test_what_is_no_slo_is_told(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_slo(text)


def test_a_figure_holds_only_below_its_limit() -> None:
    verdicts = judge(parse_slo("p99<25ms,p50<3ms,errors<0.2%"), FIGURES)
    assert [verdict.held for verdict in verdicts] == [True, False, True]
    assert verdicts[0].margin == pytest.approx(0.004)
    assert verdicts[2].as_json()["margin"] == pytest.approx(0.5)


def test_where_nothing_was_answered_no_latency_holds() -> None:
    (verdict,) = judge(parse_slo("max<1s"), FIGURES)
    assert not verdict.held
    assert verdict.margin is None
