"""The dashboard as a document: Grafana can lay it out, a reader can understand it, Prometheus can parse it.

That its queries name what exists, and find it, is seen on a real server in test_scrape.py.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.prometheus import DASHBOARD, VARIABLES, queries_of_dashboard, substituted

COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
PANELS = DASHBOARD["panels"]
GRAPHS = [it for it in PANELS if it["type"] != "row"]
# Grafana's names of units.
UNITS = {"reqps", "ops", "s", "percentunit", "short", "bytes"}


def dictionaries(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from dictionaries(child)


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    return {
        (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
    }


def checked(expressions: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`promtool check rules` on rules that record these expressions."""
    rules = [{"record": name, "expr": expression} for name, expression in expressions.items()]
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    try:
        return subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no promtool on the PATH (it comes with Debian's prometheus)")


def test_ids_are_unique_and_titles_too():
    for values in ([panel["id"] for panel in PANELS], [panel["title"] for panel in GRAPHS]):
        assert len(set(values)) == len(values)


def test_panels_fit_in_the_width_and_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        wanted = cells(panel)
        assert wanted
        assert not wanted & taken, panel["title"]
        assert {x for x, _ in wanted} <= set(range(COLUMNS)), panel["title"]
        taken |= wanted


def test_every_panel_stands_below_its_row():
    """Grafana puts panels into rows by their place, not by their order in the file."""
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in PANELS]
    assert places == sorted(places)
    assert PANELS[0]["type"] == "row"
    for row in (it for it in PANELS if it["type"] == "row"):
        assert (row["gridPos"]["x"], row["gridPos"]["w"], row["gridPos"]["h"]) == (0, COLUMNS, 1)


@pytest.mark.parametrize("panel", GRAPHS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_in_what_unit(panel):
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    # What it is, and what would be bad: not less than two clauses.
    assert len(panel["description"].split()) >= 10
    targets = panel["targets"]
    assert all(target["legendFormat"] for target in targets)
    names = [target["refId"] for target in targets]
    assert len(set(names)) == len(names) > 0
    for override in panel["fieldConfig"]["overrides"]:
        assert override["matcher"]["id"] == "byFrameRefID"
        assert override["matcher"]["options"] in names


def test_the_datasource_is_the_variable_everywhere():
    found = [it["datasource"] for it in dictionaries(DASHBOARD) if "datasource" in it]
    assert all(it == DATASOURCE for it in found)
    asking = [it for it in dictionaries(DASHBOARD) if "expr" in it or it.get("type") == "query"]
    assert all("datasource" in it for it in (*asking, *GRAPHS))


def test_variables_are_defined_and_used():
    variables = {it["name"]: it for it in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) - {"datasource"} == {"namespace", "track", "model"}
    expressions = [target["expr"] for panel in GRAPHS for target in panel["targets"]]
    used = {name for it in expressions for name in re.findall(r"\$(\w+)", it)}
    assert used == set(VARIABLES) == {"namespace", "track", "model", "__rate_interval"}


def test_a_variable_that_does_not_exist_is_found_out():
    with pytest.raises(KeyError, match="nmespace"):
        substituted('up{namespace="$nmespace"}')


def test_every_expression_parses(tmp_path):
    found = {f"expression_{i}": query.expression for i, query in enumerate(queries_of_dashboard())}
    assert len(found) > len(GRAPHS)
    done = checked(found, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(found)} rules found" in done.stdout


def test_an_expression_that_does_not_parse_is_found_out(tmp_path):
    assert checked({"broken": "sum by (track) (rate(up[5m])"}, tmp_path).returncode != 0


def test_grafana_can_provision_it():
    assert DASHBOARD["uid"] == "millibert"
    # Ids belong to a Grafana; a provisioned dashboard has none of its own.
    assert "id" not in DASHBOARD
    # The schema of Grafana 10.
    assert DASHBOARD["schemaVersion"] == 39
    assert DASHBOARD["refresh"] == "10s"
    assert DASHBOARD["time"] == {"from": "now-1h", "to": "now"}
