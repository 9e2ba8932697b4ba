"""What policy asks of every overlay: locked-down Pods, images from one place, and checkov's checks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.invariants import Breakage, Check, Invariants
from tests.manifests import (
    BASE,
    COMPONENTS,
    K8S,
    MODEL_STORES,
    NAMESPACE,
    OVERLAYS,
    ROOT,
    SUBJECTS,
    Document,
    Rendered,
    applied_by_hand,
    components_of,
    render,
    render_subject,
)

# What any cluster has.
BUILT_IN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}
IMAGES = yaml.safe_load((COMPONENTS / "images" / "kustomization.yaml").read_text())["images"]
PINNED = {f"{it.get('newName', it['name'])}:{it['newTag']}" for it in IMAGES}
CHECKOV = ROOT / ".ci" / "tools" / "checkov" / "bin"
SKIPS = K8S / ".checkov.yaml"

INVARIANTS = Invariants()


@INVARIANTS.check
def pods_are_locked_down(rendered: Rendered) -> Iterator[str]:
    """More than the Pod Security Standard `restricted`, which the namespace enforces."""
    for pods in rendered.pods():
        accounts = [
            it for it in rendered.of("ServiceAccount") if it["metadata"]["name"] == pods.spec.get("serviceAccountName")
        ]
        if any(it.get("automountServiceAccountToken", True) for it in (pods.spec, *accounts)):
            yield f"{pods} has a token for the API server"
        of_pod = pods.spec["securityContext"]
        if not of_pod.get("runAsNonRoot") or of_pod.get("runAsUser", 0) == 0:
            yield f"{pods} may run as root"
        if of_pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pods} has no seccomp profile"
        shared = {"hostNetwork", "hostPID", "hostIPC"} & {key for key, value in pods.spec.items() if value}
        if shared or any("hostPath" in volume for volume in pods.spec["volumes"]):
            yield f"{pods} shares the node's {shared or 'files'}"
        yield from (f"{pods}: {it['name']}: {problem}" for it in pods.containers for problem in unlocked(it))


def unlocked(container: Document) -> Iterator[str]:
    context = container["securityContext"]
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "may gain privileges"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "may write into its image"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "has capabilities"
    if overridden := {"runAsUser", "runAsNonRoot", "seccompProfile"} & context.keys():
        yield f"has {overridden} of its own"


@INVARIANTS.check
def the_namespace_enforces_it(rendered: Rendered) -> Iterator[str]:
    labels = rendered.get("Namespace", NAMESPACE)["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted":
            yield f"{mode}: {labels}"


@INVARIANTS.check
def images_are_those_of_one_place(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.pods():
        references = [container["image"] for container in pods.containers]
        references += [volume["image"]["reference"] for volume in pods.spec["volumes"] if "image" in volume]
        yield from (f"{pods}: {it}" for it in references if it not in PINNED)


@INVARIANTS.check
def there_is_one_store_of_models(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.pods():
        volume = pods.volume("models")
        filled = [it for it in pods.spec.get("initContainers", ()) if it["name"] == "fetch"]
        if not volume.get("persistentVolumeClaim") and not volume.get("image") and not filled:
            yield f"{pods}: nothing brings a release: {volume}"


def first(rendered: Rendered) -> Document:
    return rendered.servers()[0].main


def context(rendered: Rendered) -> Document:
    return first(rendered)["securityContext"]


def of_pod(rendered: Rendered) -> Document:
    return rendered.servers()[0].spec


BREAKAGES: dict[Check, list[Breakage]] = {
    pods_are_locked_down: [
        lambda it: context(it).update(allowPrivilegeEscalation=True),
        lambda it: context(it).update(readOnlyRootFilesystem=False),
        lambda it: context(it).update(capabilities={"drop": ["NET_RAW"]}),
        lambda it: context(it).update(runAsUser=0),
        lambda it: of_pod(it)["securityContext"].update(runAsNonRoot=False),
        lambda it: of_pod(it)["securityContext"].pop("runAsUser"),
        lambda it: of_pod(it)["securityContext"].pop("seccompProfile"),
        lambda it: of_pod(it).update(automountServiceAccountToken=True),
        lambda it: of_pod(it).update(hostNetwork=True),
        lambda it: of_pod(it)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        lambda it: of_pod(it)["initContainers"][0].update(securityContext={}),
        lambda it: it.get("ServiceAccount", "millibert").update(automountServiceAccountToken=True),
    ],
    the_namespace_enforces_it: [
        lambda it: it.get("Namespace", NAMESPACE)["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "baseline"}
        )
    ],
    images_are_those_of_one_place: [
        lambda it: first(it).update(image="millibert-serve:latest"),
        lambda it: of_pod(it)["initContainers"][0].update(image="millibert-serve"),
    ],
    there_is_one_store_of_models: [
        lambda it: it.servers()[0].volume("models").pop("persistentVolumeClaim"),
        lambda it: it.servers()[0].volume("models").update(persistentVolumeClaim=None, emptyDir={}),
    ],
}

test_it_holds_in_every_overlay = INVARIANTS.hold()
test_an_overlay_in_which_it_does_not_hold_is_found_out = INVARIANTS.can_fail({"prod-cpu": BREAKAGES})


def test_pods_that_are_applied_by_hand_are_locked_down_too():
    by_hand = applied_by_hand()
    assert by_hand.pods()
    assert list(pods_are_locked_down(by_hand)) == []
    assert list(images_are_those_of_one_place(by_hand)) == []
    assert {it["metadata"]["namespace"] for it in by_hand} == {NAMESPACE}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_one_store_of_models(overlay):
    assert len(MODEL_STORES & set(components_of(OVERLAYS[overlay]))) == 1


def test_the_base_needs_nothing_but_kubernetes():
    assert {it["apiVersion"] for it in render(BASE)} <= BUILT_IN


def test_every_image_has_a_version():
    assert len(PINNED) == len(IMAGES)
    assert not [it for it in PINNED if it.endswith(":latest")]


def test_no_version_of_an_image_stands_anywhere_else():
    """But for Pods that are applied by hand: theirs is the same."""
    found = {
        (path.relative_to(K8S), reference)
        for path in K8S.rglob("*.yaml")
        if path.parent != COMPONENTS / "images"
        for reference in re.findall(r"(?:image|reference): *[\"']?([\w./-]+[:@][\w.:-]+)", path.read_text())
    }
    assert {it for it in found if it[1] not in PINNED} == set()


def checkov(folder: Path, *options: str) -> tuple[set[str], dict[str, list[str]]]:
    """Check every file in a folder: which checks passed somewhere, and which failed, for what."""
    command = shutil.which("checkov", path=f"{CHECKOV}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("no checkov here: .ci/run installs it")
    kind = ["--framework", "kubernetes", "--skip-download", "--compact", "--output", "json"]
    done = subprocess.run(
        [command, "--directory", str(folder), *kind, *options], capture_output=True, text=True, check=False
    )
    results = json.loads(done.stdout)["results"]
    failed: dict[str, list[str]] = {}
    for it in results["failed_checks"]:
        failed.setdefault(it["check_id"], []).append(f"{it['file_path']} {it['resource']}: {it['check_name']}")
    return {it["check_id"] for it in results["passed_checks"]}, failed


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    for name in SUBJECTS:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(render_subject(name)))
    return folder


def test_checkov_finds_nothing_but_what_has_a_reason_and_that_everywhere_it_should(everything):
    """What is skipped fails without the skip: no skip outlives what it was for."""
    passed, failed = checkov(everything)
    assert len(passed) > 60
    skipped = set(yaml.safe_load(SKIPS.read_text())["skip-check"])
    assert {check: where for check, where in failed.items() if check not in skipped} == {}
    assert skipped - failed.keys() == set()


def test_with_its_configuration_checkov_is_content(everything):
    assert checkov(everything, "--config-file", str(SKIPS))[1] == {}


def test_every_skip_has_a_reason():
    lines = SKIPS.read_text().splitlines()
    skips = [number for number, line in enumerate(lines) if line.strip().startswith("- CKV")]
    assert skips
    assert [lines[number] for number in skips if not lines[number - 1].strip().startswith("# ")] == []


def test_checkov_finds_what_is_wrong(everything, tmp_path):
    rendered = render(OVERLAYS["prod-cpu"]).mutated(lambda it: context(it).update(allowPrivilegeEscalation=True))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump_all(rendered))
    assert "CKV_K8S_20" in checkov(tmp_path)[1]
