"""What must be true between the objects of every overlay: what one names or selects is there, and it fits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.invariants import Breakage, Check, Invariants, changed, without
from tests.manifests import (
    COMPONENTS,
    NAMESPACE,
    OVERLAYS,
    Document,
    Pods,
    Rendered,
    listed,
    matches,
    name_of,
    parse,
    render,
)

# Overlays of one server, which nobody may count on.
ALONE = {"dev-cpu"}
COMMENTS = "".join((path / "kustomization.yaml").read_text() for path in COMPONENTS.iterdir())

INVARIANTS = Invariants()


@INVARIANTS.check
def deployments_keep_to_their_own_pods(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        found = rendered.selected(pods.owner["spec"]["selector"])
        if found != [pods]:
            yield f"{pods} selects {listed(found)}"


@INVARIANTS.check
def servers_are_spread_over_zones_and_hosts(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        spread = pods.spec["topologySpreadConstraints"]
        if {it["topologyKey"] for it in spread} != {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}:
            yield f"{pods}: {spread}"
        yield from (f"{pods}: {it}" for it in spread if rendered.selected(it["labelSelector"]) != [pods])


@INVARIANTS.check
def nodes_can_be_drained_and_servers_stay(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        budgets = [it for it in rendered.of("PodDisruptionBudget") if matches(it["spec"]["selector"], pods.labels)]
        if len(budgets) != 1 or rendered.selected(budgets[0]["spec"]["selector"]) != [pods]:
            yield f"{pods}: not one budget of its own"
            continue
        (budget,), floor = budgets, fewest(rendered, pods)
        away = budget["spec"].get("maxUnavailable", floor - budget["spec"].get("minAvailable", 0))
        if not isinstance(away, int) or away < 1 or away >= floor > 1:
            yield f"{pods}: {away} of {floor} may go"


def fewest(rendered: Rendered, pods: Pods) -> int:
    """Return how many Pods there are at least: the autoscaler's floor, or the number of replicas."""
    for scaler in scalers(rendered):
        if target(scaler) == str(pods):
            return floor_of(scaler)
    return int(pods.owner["spec"].get("replicas", 1))


def scalers(rendered: Rendered) -> list[Document]:
    return rendered.of("HorizontalPodAutoscaler", "ScaledObject")


def target(scaler: Document) -> str:
    reference = scaler["spec"]["scaleTargetRef"]
    return f"{reference.get('kind', 'Deployment')}/{reference['name']}"


def floor_of(scaler: Document) -> int:
    spec = scaler["spec"]
    return int(spec["minReplicas"] if scaler["kind"] == "HorizontalPodAutoscaler" else spec["minReplicaCount"])


@INVARIANTS.check
def autoscalers_have_a_deployment_a_floor_and_room(rendered: Rendered) -> Iterator[str]:
    targets = [target(scaler) for scaler in scalers(rendered)]
    if len(set(targets)) != len(targets):
        yield f"two autoscalers of one Deployment: {targets}"
    for scaler in scalers(rendered):
        most = scaler["spec"].get("maxReplicas", scaler["spec"].get("maxReplicaCount"))
        if target(scaler) not in map(str, rendered.servers()):
            yield f"{name_of(scaler)} scales {target(scaler)}"
        if not 2 <= floor_of(scaler) < most:
            yield f"{name_of(scaler)}: {floor_of(scaler)} to {most}"


@INVARIANTS.check
def what_is_autoscaled_has_no_number_of_its_own(rendered: Rendered) -> Iterator[str]:
    """Else each `kubectl apply` would undo what the autoscaler has done."""
    scaled = {target(scaler) for scaler in scalers(rendered)}
    for pods in rendered.servers():
        if str(pods) in scaled and "replicas" in pods.owner["spec"]:
            yield f"{pods}: {pods.owner['spec']['replicas']} replicas"


@INVARIANTS.check
def lost_metrics_take_no_server_away(rendered: Rendered) -> Iterator[str]:
    for scaler in rendered.of("ScaledObject"):
        fallback = scaler["spec"].get("fallback", {})
        steady = str(fallback.get("behavior", "")).startswith("currentReplicas")
        if fallback.get("replicas", 0) < floor_of(scaler) or not steady:
            yield f"{name_of(scaler)}: {fallback}"


@INVARIANTS.check
def what_pods_name_is_there(rendered: Rendered) -> Iterator[str]:
    """ConfigMaps with their keys, claims, the account, the priority; Secrets are made by hand, as a comment says."""
    for pods in rendered.pods():
        there = {name_of(document) for document in rendered}
        for reference in references(pods):
            if reference.startswith("Secret/"):
                if f"`{reference.removeprefix('Secret/')}`" not in COMMENTS:
                    yield f"{pods}: nobody is told of {reference}"
            elif reference not in there:
                yield f"{pods}: there is no {reference}"
        for name, key in keys_of_config_maps(pods):
            if f"ConfigMap/{name}" in there and key not in rendered.get("ConfigMap", name)["data"]:
                yield f"{pods}: {name} has no {key}"


# Where a Pod names an object: in a volume, in a variable or in all variables, by which field; and what it names.
_SOURCES = {
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    "secret": ("Secret", "secretName"),
    "configMap": ("ConfigMap", "name"),
    "configMapKeyRef": ("ConfigMap", "name"),
    "configMapRef": ("ConfigMap", "name"),
    "secretKeyRef": ("Secret", "name"),
    "secretRef": ("Secret", "name"),
}


def references(pods: Pods) -> Iterator[str]:
    """Yield `KIND/NAME` of everything that the Pods need to start."""
    yield f"ServiceAccount/{pods.spec['serviceAccountName']}"
    if "priorityClassName" in pods.spec:
        yield f"PriorityClass/{pods.spec['priorityClassName']}"
    variables = [it for container in pods.containers for it in container.get("env", ()) if "valueFrom" in it]
    bundles = [it for container in pods.containers for it in container.get("envFrom", ())]
    for source in [*pods.spec["volumes"], *(it["valueFrom"] for it in variables), *bundles]:
        yield from (f"{kind}/{source[key][name]}" for key, (kind, name) in _SOURCES.items() if key in source)


def keys_of_config_maps(pods: Pods) -> Iterator[tuple[str, str]]:
    for container in pods.containers:
        for reference in (it.get("valueFrom", {}).get("configMapKeyRef") for it in container.get("env", ())):
            if reference:
                yield reference["name"], reference["key"]


@INVARIANTS.check
def plans_are_built_for_those_who_look_for_them(rendered: Rendered) -> Iterator[str]:
    """On the same kind of GPU, of the same release, into the folder from which `preflight` takes them, in time."""
    for pods in rendered.servers():
        looks = parse(pods.command("preflight")["args"])
        if looks is None or not looks.plans:
            continue
        if source(pods, pods.command("preflight"), looks.plans) is None or source(pods, pods.main, looks.plans) is None:
            yield f"{pods}: {looks.plans} is not mounted"
        builders = [it for it in rendered.builders() if same_labels(it, pods)]
        if rendered.builders() and len(builders) != 1:
            yield f"{pods}: {len(builders)} Jobs build its plan"
        for builder in builders:
            builds = parse(builder.main["args"])
            if builds is None or str(builds.repository) != str(looks.repository):
                yield f"{builder}: {builder.main['args']}"
            elif source(builder, builder.main, builds.plans) != source(pods, pods.main, looks.plans):
                yield f"{builder} builds into {builds.plans}, {pods} looks elsewhere"
            if not builder.owner["spec"]["activeDeadlineSeconds"] <= looks.wait:
                yield f"{builder} may take longer than {pods} waits"
            if kind_of_gpu(builder) != kind_of_gpu(pods):
                yield f"{builder} is for {kind_of_gpu(builder)}, {pods} for {kind_of_gpu(pods)}"


def same_labels(one: Pods, other: Pods) -> bool:
    return all(one.labels[name] == other.labels[name] for name in ("millibert.io/track", "millibert.io/pool"))


def source(pods: Pods, container: Document, path: object) -> Document | None:
    """Return what is mounted at a path, and for a Job writable; None: nothing, or an empty folder."""
    for mount in container["volumeMounts"]:
        if mount["mountPath"] == str(path) and not (mount.get("readOnly") and pods.owner["kind"] == "Job"):
            return pods.volume(mount["name"]).get("persistentVolumeClaim")
    return None


def kind_of_gpu(pods: Pods) -> tuple[object, ...]:
    """Return the nodes, the device and the release."""
    devices = {name: it for name, it in pods.main["resources"]["limits"].items() if "/" in name}
    releases = dict(keys_of_config_maps(pods))
    return pods.spec.get("nodeSelector"), devices, {name for name, key in releases.items() if key == "MODEL_RELEASE"}


@INVARIANTS.check
def everything_is_in_one_namespace(rendered: Rendered) -> Iterator[str]:
    for document in rendered:
        if document["kind"] in ("Namespace", "PriorityClass"):
            continue
        if document["metadata"].get("namespace") != NAMESPACE:
            yield f"{name_of(document)} is in {document['metadata'].get('namespace')}"


# What each check must notice, in the overlay `canary`, which has most of them.


POD = "spec/template/spec"
EVERY_SERVER = {"app.kubernetes.io/component": "server"}
BREAKAGES: dict[Check, list[Breakage]] = {
    deployments_keep_to_their_own_pods: [changed("Deployment", "spec/selector", {"matchLabels": EVERY_SERVER})],
    servers_are_spread_over_zones_and_hosts: [
        changed("Deployment", f"{POD}/topologySpreadConstraints", []),
        changed("Deployment", f"{POD}/topologySpreadConstraints/1/labelSelector", {"matchLabels": EVERY_SERVER}),
    ],
    nodes_can_be_drained_and_servers_stay: [
        without("PodDisruptionBudget"),
        changed("PodDisruptionBudget", "spec/maxUnavailable", 0),
        changed("PodDisruptionBudget", "spec/maxUnavailable", 3),
        changed("PodDisruptionBudget", "spec/selector", {"matchLabels": EVERY_SERVER}),
    ],
    autoscalers_have_a_deployment_a_floor_and_room: [
        changed("ScaledObject", "spec/scaleTargetRef/name", "triton"),
        changed("ScaledObject", "spec/minReplicaCount", 0),
        changed("ScaledObject", "spec/maxReplicaCount", 2),
        lambda it: it.documents.append(it.of("ScaledObject")[0]),
    ],
    what_is_autoscaled_has_no_number_of_its_own: [
        lambda it: [pods.owner["spec"].update(replicas=2) for pods in it.servers()]
    ],
    lost_metrics_take_no_server_away: [
        changed("ScaledObject", "spec/fallback", {}),
        changed("ScaledObject", "spec/fallback/behavior", "static"),
    ],
    what_pods_name_is_there: [
        without("ConfigMap"),
        without("PersistentVolumeClaim"),
        without("ServiceAccount"),
        without("PriorityClass"),
        lambda it: [config["data"].clear() for config in it.of("ConfigMap")],
        changed("Deployment", f"{POD}/containers/0/envFrom", [{"secretRef": {"name": "nobody-knows"}}]),
    ],
    everything_is_in_one_namespace: [
        changed("Service", "metadata/namespace", "default"),
        lambda it: it.of("Deployment")[0]["metadata"].pop("namespace"),
    ],
}

BREAKAGES_ON_GPUS: dict[Check, list[Breakage]] = {
    plans_are_built_for_those_who_look_for_them: [
        changed("Job", f"{POD}/nodeSelector", {"nvidia.com/gpu.product": "Tesla-T4"}),
        changed("Job", f"{POD}/containers/0/args/4", "/tmp/plans"),
        changed("Job", f"{POD}/containers/0/resources/limits", {"nvidia.com/mig-1g.10gb": "1"}),
        changed("Job", f"{POD}/containers/0/env/0/valueFrom/configMapKeyRef/name", "release-of-another"),
        changed("Job", "spec/activeDeadlineSeconds", 3600),
        lambda it: it.of("Job")[0]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][1].update(
            readOnly=True
        ),
        lambda it: [pods.volume("plans").update(persistentVolumeClaim={"claimName": "a"}) for pods in it.builders()],
        lambda it: [pods.command("preflight").update(volumeMounts=[]) for pods in it.servers()],
    ]
}

test_it_holds_in_every_overlay = INVARIANTS.hold()
test_an_overlay_in_which_it_does_not_hold_is_found_out = INVARIANTS.can_fail(
    {"canary": BREAKAGES, "prod-gpu": BREAKAGES_ON_GPUS}
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_production_has_two_of_everything(overlay):
    rendered = render(OVERLAYS[overlay])
    few = {str(pods): fewest(rendered, pods) for pods in rendered.servers()}
    assert (min(few.values()) == 1) == (overlay in ALONE), few
