"""Every alert fires when it should and is silent when something similar happens; each has a page that says what to do.

The cases are in alerts/*.yaml, in the format of `promtool test rules`. What a file lacks, the rules and their order, is
put in front of it here: the rules are in Kubernetes objects, whose `spec` is a rules file. Cases ask for the series
ALERTS; promtool's own `alert_rule_test` wants every annotation spelt out, which a few cases do.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.manifests import COMPONENTS, ROOT, need

RULES = [COMPONENTS / "monitoring" / f"{name}.yaml" for name in ("objectives", "recording-rules", "alerts")]
CASES = sorted((Path(__file__).parent / "alerts").glob("*.yaml"))
RUNBOOKS = ROOT / "docs" / "runbooks"
MATCHER = re.compile(r'(\w+)(=~?)"([^"]*)"')

Rule = dict[str, Any]


def groups() -> Iterator[dict[str, Any]]:
    """Yield every group of rules, in the order in which it is to be evaluated."""
    for path in RULES:
        yield from yaml.safe_load(path.read_text())["spec"]["groups"]


ALL_RULES: list[Rule] = [rule for group in groups() for rule in group["rules"]]
# Several rules may have one name: the same alert for windows or severities of its own.
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]
NAMES = {rule["alert"] for rule in ALERTS}


def labels(rule: Rule) -> dict[str, str]:
    """What every alert of a rule carries."""
    return {"alertname": rule["alert"], **rule["labels"]}


def named(rule: Rule) -> str:
    return "-".join(labels(rule).values())


each_alert = pytest.mark.parametrize("rule", ALERTS, ids=named)


@pytest.fixture
def plain_rules(tmp_path: Path) -> list[Path]:
    """The rules as promtool and Prometheus read them."""
    plain = [tmp_path / path.name for path in RULES]
    for source, target in zip(RULES, plain, strict=True):
        target.write_text(yaml.safe_dump(yaml.safe_load(source.read_text())["spec"]))
    return plain


def promtool(*arguments: str | Path) -> None:
    """Run promtool; what it has to complain about is the test's failure."""
    done = subprocess.run([need("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def expectations() -> Iterator[tuple[str, list[str]]]:
    """Yield what the cases ask for, a selector of ALERTS, and the labels of each alert that is to come back."""
    for test in (test for path in CASES for test in yaml.safe_load(path.read_text())["tests"]):
        for it in test.get("promql_expr_test", ()):
            if it["expr"].startswith("ALERTS{"):
                yield it["expr"], [sample["labels"] for sample in it["exp_samples"]]
        for it in test.get("alert_rule_test", ()):
            selector = f'{{alertname="{it["alertname"]}"}}'
            found = [{"alertname": it["alertname"], **alert["exp_labels"]} for alert in it["exp_alerts"]]
            yield selector, [",".join(f'{key}="{value}"' for key, value in alert.items()) for alert in found]


def could_be(rule: Rule, selector: str) -> bool:
    """Whether an alert of this rule may match a selector; labels that come from series may have any value."""
    own = labels(rule)
    asked = [(own[key], how, value) for key, how, value in MATCHER.findall(selector) if key in own]
    return all(re.fullmatch(value if how == "=~" else re.escape(value), has) for has, how, value in asked)


def test_the_rules_are_valid(plain_rules):
    promtool("check", "rules", *plain_rules)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path, plain_rules, tmp_path):
    order = [group["name"] for group in groups()]
    assert len(order) == len(set(order)), "promtool orders groups by their names"
    setting = yaml.safe_dump({"rule_files": [str(it) for it in plain_rules], "group_eval_order": order})
    test = tmp_path / "test.yaml"
    test.write_text(setting + path.read_text())
    promtool("test", "rules", test)


@each_alert
def test_every_alert_has_a_case_that_fires_and_one_that_is_silent(rule):
    outcomes = {
        any(could_be(rule, found) for found in firing)
        for selector, firing in expectations()
        if could_be(rule, selector)
    }
    assert outcomes == {True, False}


def test_cases_are_of_alerts_that_exist():
    """A case of a misspelt name would be silent for ever."""
    for selector, _ in expectations():
        assert any(could_be(rule, selector) for rule in ALERTS), selector
        asked = {key: value for key, _, value in MATCHER.findall(selector)}
        assert asked.get("alertstate", "firing") == "firing", selector


@each_alert
def test_every_alert_says_how_urgent_it_is_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"].endswith(f'label "base" }}}}{{{{ end }}}}/{rule["alert"]}.md')


def test_runbooks_are_where_alerts_point_to():
    (base,) = (rule["labels"]["base"] for rule in ALL_RULES if rule.get("record") == "millibert:runbooks")
    assert ROOT / base == RUNBOOKS
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == NAMES


@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_the_index_lists_every_page_under_its_severities(severity):
    index = (RUNBOOKS / "README.md").read_text()
    sections = dict(re.findall(r"^## `(\w+)`[^\n]*\n(.*?)(?=^## |\Z)", index, re.MULTILINE | re.DOTALL))
    listed = re.findall(r"\]\((Millibert\w+)\.md\)", sections[severity])
    assert sorted(listed) == sorted({rule["alert"] for rule in ALERTS if rule["labels"]["severity"] == severity})


def test_alerts_read_only_series_that_are_recorded():
    recorded = {rule["record"] for rule in ALL_RULES if "record" in rule}
    read = {name for rule in ALERTS for name in re.findall(r"millibert:[a-z0-9_:]+", rule["expr"])}
    assert read
    assert read <= recorded
