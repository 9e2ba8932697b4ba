"""Replicas, nodes and cost for a rate, reckoned from a service curve."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.test_service_curve import curve_of, figures

from load import capacity
from load.capacity import Assumptions

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "scaling" / "curve.json"
# p99 rises from 10 ms at 100 requests/s to 100 ms at 1,000.
LINEAR = curve_of((100, figures(100, p99_ms=10, waiting=1)), (1000, figures(1000, p99_ms=100, waiting=10)))


def assumed(**changes):
    usual = {"zones": 3, "headroom": 0.0, "imbalance": 0.0, "replicas_per_node": 1, "cost_per_replica_hour": 1.0}
    return Assumptions(**{**usual, **changes})


@pytest.mark.parametrize(
    ("serving", "zones", "replicas"),
    # 2 and 3 replicas lose one of their zones with one of them; 4 lose two.
    [(1, 3, 2), (2, 3, 3), (3, 3, 5), (4, 3, 6), (10, 3, 15), (100, 3, 150), (1, 2, 2), (10, 2, 20), (7, 1, 8)],
)
def test_a_zone_may_be_lost(serving, zones, replicas):
    assert capacity.survivor(serving, zones) == replicas
    assert capacity.left(replicas, zones) >= serving
    assert capacity.left(replicas - 1, zones) < serving


def test_nodes_are_filled_zone_by_zone():
    assert capacity.nodes(10, zones=3, per_node=1) == 10
    # 4, 3 and 3 replicas; 2, 2 and 2 nodes.
    assert capacity.nodes(10, zones=3, per_node=2) == 6
    assert capacity.nodes(10, zones=1, per_node=4) == 3


def test_a_fleet_in_numbers():
    fleet = capacity.plan(LINEAR, 500, 10_000, assumed())
    assert (fleet.serving, fleet.with_headroom, fleet.with_zone_lost, fleet.replicas) == (20, 20, 30, 30)
    assert fleet.p99_ms == pytest.approx(10_000 / 30 / 10)
    assert fleet.p99_zone_lost_ms == pytest.approx(50)
    assert fleet.cost_per_hour == 30
    assert fleet.cost_per_million == pytest.approx(30 / (10_000 * 3600) * 1e6)


def test_headroom_beyond_a_zone_counts_instead():
    fleet = capacity.plan(LINEAR, 500, 10_000, assumed(headroom=1.0))
    assert (fleet.with_headroom, fleet.with_zone_lost, fleet.replicas) == (40, 30, 40)


def test_the_busiest_replica_meets_the_objective():
    fleet = capacity.plan(LINEAR, 500, 10_000, assumed(imbalance=0.25))
    assert fleet.serving == math.ceil(10_000 * 1.25 / 500) == 25
    assert fleet.p99_zone_lost_ms <= 50 < capacity.plan(LINEAR, 500, 10_000, assumed()).p99_zone_lost_ms * 1.25


@pytest.fixture
def curve_file(tmp_path):
    path = tmp_path / "curve.json"
    path.write_text(LINEAR.model_dump_json())
    return str(path)


def test_the_command_prints_measured_assumed_and_reckoned(curve_file, capsys, tmp_path):
    plot = tmp_path / "pictures" / "curve.svg"
    options = ["--rate", "10000", "--p99-ms", "50", "--imbalance", "0", "--headroom", "0", "--plot", str(plot)]
    assert capacity.main(["--curve", curve_file, *options, "--cost-per-replica-hour", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "one replica serves 500 requests/s within a p99 of 50 ms" in printed
    assert "at that rate 5.0 requests wait" in printed
    assert " ".join(printed.splitlines()[-1].split()) == "10,000 20 20 30 30 30 33.3 50.0 6.00 0.1667"
    kinds = [element.tag.rpartition("}")[2] for element in ElementTree.parse(plot).getroot().iter()]
    assert kinds.count("polyline") == 3


def test_the_table_goes_from_a_hundred_to_a_million(curve_file, capsys):
    assert capacity.main(["--curve", curve_file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rates = [fleet["rate"] for fleet in found["fleets"]]
    assert (rates[0], rates[-1]) == (100, 1_000_000)
    replicas = [fleet["replicas"] for fleet in found["fleets"]]
    assert replicas == sorted(replicas)
    assert all(fleet["p99_zone_lost_ms"] <= 50.0001 for fleet in found["fleets"])


def test_what_was_measured_is_the_limit(curve_file, capsys):
    assert capacity.main(["--curve", curve_file, "--p99-ms", "5000"]) == 0
    assert (
        "one replica serves 1,000 requests/s within a p99 of 5000 ms and 0.1% refused; the highest rate measured"
        in (capsys.readouterr().out)
    )


def test_an_objective_out_of_reach_is_told(curve_file, capsys):
    assert capacity.main(["--curve", curve_file, "--p99-ms", "3"]) == 1
    assert "no measured rate is within a p99 of 3 ms" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--rate", "0"],
        ["--rate", "-5"],
        ["--zones", "0"],
        ["--headroom", "-0.1"],
        ["--imbalance", "inf"],
        ["--cost-per-replica-hour", "-1"],
        ["--p99-ms", "0"],
        ["--replicas-per-node", "0"],
    ],
)
def test_wrong_numbers_are_wrong_usage(curve_file, wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        capacity.main(["--curve", curve_file, *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints(capsys):
    assert capacity.main(["--curve", str(KEPT)]) == 0
    page = (ROOT / "docs" / "scaling.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in page
