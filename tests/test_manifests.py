"""Every overlay and every sensible combination of components renders, and what comes out is valid, field by field.

Kubernetes' own objects are checked against the strict schemas of several versions (package kubernetes-validate), custom
resources against those of their projects (.ci/custom-resources.mjs; .ci/run installs what it needs). What no schema
here knows are rules written in CEL.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import manifests
from tests.manifests import COMPONENTS, ORDER, OVERLAYS, ROOT, Document, Rendered, RenderError

# Of Kubernetes, minor versions of 1: the oldest that is meant to work, some between, and the newest with a schema here.
VERSIONS = (28, 30, 32, 34, 37)
# What needs a newer one: image volumes are on by request in 1.33.
SINCE = {"model-store-image": 33}
CUSTOM_GROUPS = frozenset({"gateway.networking.k8s.io", "keda.sh", "monitoring.coreos.com"})
VALIDATORS = ROOT / ".ci" / "tools" / "node_modules"

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Rendered | RenderError]:
    """Every overlay and every combination, by its components: what became of it."""
    manifests.need("kubectl")
    folder = tmp_path_factory.mktemp("combinations")
    places = {names: manifests.overlay_of(names, folder) for names in manifests.combinations()}
    places |= {(*manifests.components_of(path), f"overlay {name}"): path for name, path in OVERLAYS.items()}
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(places, pool.map(_attempt, places.values()), strict=True))


def _attempt(place: Path) -> Rendered | RenderError:
    try:
        return manifests.render(place)
    except RenderError as error:
        return error


@pytest.fixture(scope="module")
def objects(rendered: dict[tuple[str, ...], Rendered | RenderError]) -> dict[int, dict[str, Document]]:
    """What a cluster of each version may be given: every different object."""
    different: dict[int, dict[str, Document]] = {version: {} for version in VERSIONS}
    for names, outcome in rendered.items():
        since = max(SINCE.get(name, 0) for name in names)
        documents = outcome if isinstance(outcome, Rendered) else ()
        for version in (it for it in VERSIONS if it >= since):
            different[version].update({json.dumps(document, sort_keys=True): document for document in documents})
    return different


def test_the_rules_of_combination_know_every_component_and_no_other():
    found = [path for path in COMPONENTS.rglob("kustomization.yaml") if "kind: Component" in path.read_text()]
    assert {str(path.parent.relative_to(COMPONENTS)) for path in found} == {*ORDER, *manifests.OF_POOLS}
    assert manifests.is_ordered(ORDER)


def test_every_overlay_that_is_promised_is_there():
    assert set(OVERLAYS) == {"dev-cpu", "prod-cpu", "prod-gpu", "prod-gpu-mig", "canary"}


def test_everything_renders_without_a_warning(rendered):
    assert {names: str(it) for names, it in rendered.items() if isinstance(it, RenderError)} == {}
    assert len(rendered) > 100


@overlays
def test_an_overlay_keeps_the_rules_of_combination(overlay):
    names = manifests.components_of(OVERLAYS[overlay])
    assert set(names) == set(manifests.complete(names))
    assert manifests.is_sensible(names)
    assert manifests.is_ordered(names)


def test_two_autoscalers_of_one_deployment_do_not_render(tmp_path):
    place = manifests.overlay_of(manifests.complete(manifests.AUTOSCALERS), tmp_path)
    with pytest.raises(RenderError, match="/spec/replicas"):
        manifests.render(place)


@pytest.mark.parametrize("name", ORDER)
def test_a_component_says_first_what_it_is(name):
    text = (COMPONENTS / name / "kustomization.yaml").read_text()
    comment = text.partition("apiVersion:")[0]
    assert text.startswith("# ")
    assert len(comment) > 80
    assert yaml.safe_load(text)["kind"] == "Component"


@overlays
def test_an_overlay_has_only_what_is_different_about_it(overlay):
    text = (OVERLAYS[overlay] / "kustomization.yaml").read_text()
    assert 6 <= len(text.splitlines()) <= 20
    assert text.startswith("# ")


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_of_kubernetes_are_valid(objects, version):
    documents = [it for it in objects[version].values() if not _is_custom(it)]
    assert _invalid(documents, version) == []
    assert {"Deployment", "PodDisruptionBudget", "NetworkPolicy"} <= {it["kind"] for it in documents}


@pytest.mark.parametrize("version", VERSIONS)
def test_pods_that_are_applied_by_hand_are_valid(version):
    assert _invalid(manifests.applied_by_hand(), version) == []


def test_custom_resources_are_valid(objects):
    documents = [it for it in objects[VERSIONS[-1]].values() if _is_custom(it)]
    found = zip(documents, _problems(documents), strict=True)
    assert {f"{it['kind']} {it['metadata']['name']}": problems for it, problems in found if problems} == {}
    assert {"PodMonitor", "PrometheusRule", "ScaledObject", "GRPCRoute", "HTTPRoute"} <= {
        it["kind"] for it in documents
    }


def test_an_object_with_a_wrong_field_is_found_out(objects):
    """One of each kind, with each field of it misspelt, and with each value of a wrong type."""
    documents = list({it["kind"]: it for it in objects[VERSIONS[-1]].values() if not _is_custom(it)}.values())
    wrong = [it for document in documents for it in (*misspelt(document), *mistyped(document))]
    passed = {where for where, document in wrong if not _invalid([document], VERSIONS[-1])}
    assert passed == set()


def test_a_custom_resource_with_a_wrong_field_is_found_out(objects):
    documents = list({it["kind"]: it for it in objects[VERSIONS[-1]].values() if _is_custom(it)}.values())
    wrong = [it for document in documents for it in (*misspelt(document), *mistyped(document))]
    found = _problems([document for _, document in wrong])
    assert {where for (where, _), problems in zip(wrong, found, strict=True) if not problems} == set()


def test_what_is_new_is_refused_by_the_versions_before_it(rendered, objects):
    """Else SINCE would be a guess."""
    for name, since in SINCE.items():
        (document,) = rendered[manifests.complete([name])].of("Deployment")
        assert _invalid([document], min(VERSIONS))
        assert not _invalid([document], since)


def _is_custom(document: Document) -> bool:
    return document["apiVersion"].partition("/")[0] in CUSTOM_GROUPS


def _invalid(documents: Iterable[Document], version: int) -> list[str]:
    """Return what is wrong with objects of Kubernetes itself, in that version."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="extra `dev`")
    found = []
    for document in documents:
        try:
            kubernetes_validate.validate(document, f"1.{version}", strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{document['kind']}{error.json_path[1:]}: {error.message}")
    return found


def _problems(documents: list[Document]) -> list[list[str]]:
    """Return what is wrong with each custom resource."""
    if not VALIDATORS.is_dir():
        pytest.skip("no schemas of custom resources here: .ci/run installs them")
    command = [manifests.need("node"), str(ROOT / ".ci" / "custom-resources.mjs"), str(VALIDATORS)]
    done = subprocess.run(command, input=json.dumps(documents), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdicts: list[list[str]] = json.loads(done.stdout)
    return verdicts


# Below these, keys are data and not names of fields.
_FREE = frozenset({"annotations", "labels", "matchLabels", "data", "stringData", "limits", "requests", "nodeSelector"})
_Path = tuple[str | int, ...]


def misspelt(document: Document) -> Iterator[tuple[str, Document]]:
    """Yield copies of an object in each of which the name of one field is wrong, and where."""
    for path, _ in _nodes(document):
        if path and isinstance(path[-1], str) and not _is_free(path[:-1], document):
            copied = copy.deepcopy(document)
            parent = _at(copied, path[:-1])
            parent[f"{path[-1]}x"] = parent.pop(path[-1])
            yield _name(path), copied


def mistyped(document: Document) -> Iterator[tuple[str, Document]]:
    """Yield copies of an object in each of which one value is of a wrong type, and where."""
    for path, value in _nodes(document):
        if path:
            copied = copy.deepcopy(document)
            _at(copied, path[:-1])[path[-1]] = 7 if isinstance(value, dict | list) else {"wrong": "type"}
            yield _name(path), copied


def _is_free(path: _Path, document: Document) -> bool:
    # A Service's selector is labels, others' have fields. KEDA's scalers each have parameters of their own.
    of_service = path == ("spec", "selector") and document["kind"] == "Service"
    of_trigger = len(path) == 4 and path[1] == "triggers" and path[3] == "metadata"
    return of_service or of_trigger or (path != () and path[-1] in _FREE)


def _nodes(value: object, path: _Path = ()) -> Iterator[tuple[_Path, object]]:
    """Yield everything in an object, of lists the first, but for what says which schema applies."""
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        if path or key not in ("apiVersion", "kind"):
            yield from _nodes(child, (*path, key))


def _at(value: Any, path: _Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _name(path: _Path) -> str:
    return "".join(f"/{part}" for part in path)
