"""What monitoring takes for granted: how a real Triton counts each end of a request, and that runbooks are right."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.manifests import BASE, COMPONENTS, ROOT, need, overlay_of, render
from tests.prometheus import metrics_of, queries_of_dashboard, queries_of_rules, rules
from tritonclient.utils import InferenceServerException

from millibert import cli
from millibert._errors import UsageError
from millibert_ensemble.contract import BERT, COMPOSING_MODELS, POSTPROCESS, QUEUE_TIMEOUT_PARAMETER, TOKENIZER
from millibert_ensemble.server import TritonServer

SERVICE = "support"
GOOD = b"where is my parcel"
# Counters may follow an answer by a moment.
PATIENCE_SECONDS = 10.0

# By how much each counter moves: success, or why a request failed or was refused; and the model.
Counts = dict[tuple[str, str], float]


@contextlib.contextmanager
def alone(repository: Path) -> Iterator[TritonServer]:
    """Triton without its supervisor, which would start it again before anybody could see it fail."""
    try:
        server = TritonServer(repository)
    except UsageError as error:
        pytest.skip(str(error))
    try:
        server.start()
        server.wait_ready()
        # The text that proved it is counted, and will not come on top of what a test does.
        wait(lambda: counted(server)["success", SERVICE] > 0)
        yield server
    finally:
        # Not drained: it would wait for the models that tests have killed.
        server.close()


@pytest.fixture(scope="module")
def ensemble(release) -> Iterator[TritonServer]:
    with alone(release.repository) as server:
        yield server


@pytest.fixture(scope="module")
def fused(release, tmp_path_factory) -> Iterator[TritonServer]:
    out = tmp_path_factory.mktemp("fused") / "repository"
    assert cli.main(["fuse", "--repository", str(release.repository), "--out", str(out)]) == 0
    with alone(out) as server:
        yield server


def counted(server: TritonServer) -> Counts:
    """All but the ensemble's own failures, which mix everything that can go wrong, and which no rule reads."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    kinds = ("nv_inference_request_success", "nv_inference_request_failure", "millibert_refused_requests")
    samples = [sample for family in families if family.name in kinds for sample in family.samples]
    found = {(it.labels.get("reason", "success"), it.labels["model"]): it.value for it in samples}
    return {key: value for key, value in found.items() if key != ("OTHER", SERVICE)}


def moved(server: TritonServer, before: Counts) -> Counts:
    return {key: value - before[key] for key, value in counted(server).items() if value != before[key]}


def after(server: TritonServer, act: Callable[[], object], expected: Counts) -> Counts:
    """Do something, and return what it has counted, as soon as that is what is expected."""
    before = counted(server)
    act()
    wait(lambda: moved(server, before) == expected)
    return moved(server, before)


def wait(condition: Callable[[], bool]) -> None:
    """Until it is so; what has not become so after a while is for the caller to find out."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def ask(server: TritonServer, text: bytes = GOOD, count: int = 1, **parameters: Any) -> str | None:
    """Send one request; the HTTP status that refuses it, or None for an answer."""
    with tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://")) as client:
        try:
            client.infer(SERVICE, [tensor(tritonclient.http.InferInput, text, count)], parameters=parameters)
        except InferenceServerException as error:
            return str(error.status())
    return None


def tensor(kind: Any, text: bytes, count: int) -> Any:
    made = kind("TEXT", [count, 1], "BYTES")
    made.set_data_from_numpy(np.full((count, 1), text, dtype=object))
    return made


def give_up(server: TritonServer, requests: int) -> None:
    """Send requests that take a while all together, and cancel them when the first has come to the engine."""
    before = counted(server)
    with tritonclient.grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://")) as client:
        long = tensor(tritonclient.grpc.InferInput, GOOD * 20, 16)
        calls = [client.async_infer(SERVICE, [long], lambda result, error: None) for _ in range(requests)]
        wait(lambda: ("success", TOKENIZER) in moved(server, before))
        for call in calls:
            call.cancel()


def kill(server: TritonServer, model: str) -> None:
    for stub in server.stubs():
        if stub.model == model:
            os.kill(stub.pid, signal.SIGKILL)


def success(*models: str) -> Counts:
    return {("success", model): 1 for model in models}


@pytest.mark.e2e
def test_an_ensemble_counts_each_end_of_a_request_where_it_comes(ensemble):
    everyone = success(SERVICE, *COMPOSING_MODELS)
    assert after(ensemble, lambda: ask(ensemble), everyone) == everyone

    mistake = {**success(TOKENIZER), ("invalid", TOKENIZER): 1}
    assert after(ensemble, lambda: ask(ensemble, b"\xff"), mistake) == mistake
    late_mistake = {**success(*COMPOSING_MODELS), ("invalid", POSTPROCESS): 1}
    assert after(ensemble, lambda: ask(ensemble, top_k=1000), late_mistake) == late_mistake

    no_wait: dict[str, Any] = {QUEUE_TIMEOUT_PARAMETER: 0.001}
    busy = {**success(TOKENIZER, BERT), ("busy", BERT): 1}
    assert after(ensemble, lambda: ask(ensemble, **no_wait), busy) == busy


@pytest.mark.e2e
def test_what_is_no_request_for_the_model_is_counted_nowhere(ensemble):
    def act() -> None:
        assert ask(ensemble, count=1000) == "400"
        assert ask(ensemble) is None  # counters that would move have moved with this one

    everyone = success(SERVICE, *COMPOSING_MODELS)
    assert after(ensemble, act, everyone) == everyone


@pytest.mark.e2e
def test_a_client_that_goes_away_is_no_failure_of_the_server(ensemble):
    before = counted(ensemble)
    give_up(ensemble, 60)
    # What is answered is behind all of them in every queue. On a slow machine some are busy, and so is this at first.
    wait(lambda: ask(ensemble) is None)
    ends = {why for why, _ in moved(ensemble, before)}
    assert "CANCELED" in ends
    assert ends <= {"success", "busy", "CANCELED"}


@pytest.mark.e2e
def test_a_dead_model_of_an_ensemble_fails_everything_and_succeeds_in_nothing(ensemble):
    kill(ensemble, BERT)
    dead = {**success(TOKENIZER), ("BACKEND", BERT): 1}
    assert after(ensemble, lambda: ask(ensemble), dead) == dead


@pytest.mark.e2e
def test_a_fused_release_counts_under_the_name_of_the_service(fused):
    assert after(fused, lambda: ask(fused), success(SERVICE)) == success(SERVICE)
    # To Triton it has succeeded: what a client got wrong is to be taken off.
    mistake = {**success(SERVICE), ("invalid", SERVICE): 1}
    assert after(fused, lambda: ask(fused, b"\xff"), mistake) == mistake
    kill(fused, SERVICE)
    dead: Counts = {("BACKEND", SERVICE): 1}
    assert after(fused, lambda: ask(fused), dead) == dead


def test_an_overlay_changes_objectives_and_the_address_of_runbooks_as_the_component_says(tmp_path):
    component = COMPONENTS / "monitoring"
    comment = re.findall(r"^# {5}(.*)$", (component / "kustomization.yaml").read_text(), re.MULTILINE)
    patches = yaml.safe_load("\n".join(comment))
    overlay = overlay_of(("monitoring", "images"), tmp_path)
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump({**kustomization, **patches}))
    (group,) = render(overlay).get("PrometheusRule", "millibert-objectives")["spec"]["groups"]
    before = yaml.safe_load((component / "objectives.yaml").read_text())["spec"]["groups"][0]["rules"]
    changed = {rule["record"]: rule for rule, old in zip(group["rules"], before, strict=True) if rule != old}
    assert set(changed) == {"millibert:objective:p99_seconds", "millibert:runbooks"}
    assert changed["millibert:objective:p99_seconds"]["expr"] == "vector(0.05)"
    assert changed["millibert:runbooks"]["labels"]["base"].startswith("https://")


RUNBOOKS = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
PAGES = [path for path in RUNBOOKS if path.stem != "README"]
# `promtool query instant "$PROMETHEUS" 'expression'`; a line may go on below.
ASKED = re.compile(r"""promtool query \w+ "\$PROMETHEUS"[ \\\n]+'((?:[^']|'"\$POD"')+)'""")
# In running text, what begins like a series and has no blank before its first bracket is a query too.
QUOTED = re.compile(r"`((?:\w+\((?:\w+ )*)*(?:millibert[:_]|nv_|kube_|container_|up\{)[^`]*)`")


def queries(page: Path) -> list[str]:
    text = page.read_text()
    found = [*ASKED.findall(text), *QUOTED.findall(re.sub(r"^    .*$", "", text, flags=re.MULTILINE))]
    return [query.replace("""'"$POD"'""", "pod") for query in found]


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@each_page
def test_a_runbook_says_what_it_means_for_users_and_then_what_to_do(page):
    text = page.read_text()
    assert text.startswith(f"# {page.stem}\n\n**For users:** ")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["See", "Causes, likely first", "Do", "Over"]
    assert re.findall(r"^(\d)\. ", text, re.MULTILINE)[:3] == ["1", "2", "3"]


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_links_of_runbooks_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#]+)#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), re.MULTILINE)
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings], (target, anchor)


def test_queries_of_runbooks_parse(tmp_path):
    found = [query for page in PAGES for query in queries(page)]
    assert len(found) > len(PAGES)
    asked = "".join(page.read_text() for page in PAGES).count("promtool query")
    assert sum(len(ASKED.findall(page.read_text())) for page in PAGES) == asked
    numbered = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(found)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": numbered}]}))
    command = [need("promtool"), "check", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_series_of_runbooks_are_those_of_the_rules_and_the_dashboard():
    """Which exist, as is seen on a real server in test_scrape.py."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = {name for it in (*queries_of_rules(), *queries_of_dashboard()) for name in metrics_of(it.expression)}
    for page in PAGES:
        for query in queries(page):
            named = metrics_of(query)
            assert named, (page.stem, query)
            assert named <= known | recorded, (page.stem, query)


@each_page
def test_commands_of_runbooks_name_what_the_pods_have(page):
    spec = yaml.safe_load((BASE / "server" / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    containers = {it["name"] for it in (*spec["containers"], *spec["initContainers"])}
    ports = {str(port["containerPort"]) for it in spec["containers"] for port in it["ports"]}
    text = page.read_text()
    commands = re.findall(r"kubectl [^\n`]*", text)
    assert commands
    for command in commands:
        named = re.findall(r" -c (\w+)", command) if " -- sh -c" not in command else ["triton"]
        assert set(named) <= containers, command
        forwarded = re.search(r"port-forward \S+ ((?:\d+ )+)&", command)
        assert forwarded is None or set(forwarded[1].split()) <= ports, command
