"""What must be true of how requests reach servers, in every overlay: Services, policies, routes, timeouts."""

from __future__ import annotations

from collections.abc import Iterator

from tests.invariants import Breakage, Check, Invariants, changed, without
from tests.manifests import Document, Pods, Rendered, listed, matches, name_of, seconds
from tritonclient.grpc import service_pb2

from millibert._asking import DEFAULT_TIMEOUT
from millibert_build.scenario import Serving

INVARIANTS = Invariants()


@INVARIANTS.check
def services_lead_to_ports_of_servers(rendered: Rendered) -> Iterator[str]:
    for service in rendered.of("Service"):
        reached = rendered.selected({"matchLabels": service["spec"]["selector"]})
        if not reached or not {str(pods) for pods in reached} <= {str(pods) for pods in rendered.servers()}:
            yield f"{name_of(service)} selects {listed(reached)}"
        for port in service["spec"]["ports"]:
            yield from (
                f"{pods} has no {port}" for pods in reached if pods.find_port(port["targetPort"]) != port["port"]
            )
        if len({pods.labels["millibert.io/track"] for pods in reached}) > 1:
            yield f"{name_of(service)} mixes tracks: the weights of a route would mean nothing"


@INVARIANTS.check
def every_server_is_reached(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        services = [it for it in rendered.of("Service") if it["spec"]["selector"].items() <= pods.labels.items()]
        if not services:
            yield f"{pods}: no Service leads there"
        stable = pods.labels["millibert.io/track"] == "stable"
        if stable and not any(it["spec"].get("clusterIP") == "None" for it in services):
            yield f"{pods}: clients that balance by themselves need a headless Service"


@INVARIANTS.check
def network_policies_let_in_what_is_meant_to_come(rendered: Rendered) -> Iterator[str]:
    policies = rendered.of("NetworkPolicy")
    if not any(closes_everything(policy["spec"]) for policy in policies):
        yield "what no policy names is let through"
    for policy in policies:
        reached = rendered.selected(policy["spec"]["podSelector"])
        if not reached:
            yield f"{name_of(policy)} selects nothing"
        for port in (port for rule in policy["spec"].get("ingress", ()) for port in rule["ports"]):
            yield from (
                f"{name_of(policy)}: {pods} has no {port}" for pods in reached if not pods.find_port(port["port"])
            )
    for pods in rendered.servers():
        missing = {"http", "grpc", "metrics", "health"} - let_in(rendered, pods)
        # components/tls closes HTTP.
        if missing - ({"http"} if not offers(rendered, "http") else set()):
            yield f"{pods}: nothing may reach {missing}"


def closes_everything(spec: Document) -> bool:
    rules = "ingress" in spec or "egress" in spec
    return not spec["podSelector"] and not rules and set(spec["policyTypes"]) == {"Ingress", "Egress"}


def let_in(rendered: Rendered, pods: Pods) -> set[str]:
    of_pods = [it["spec"] for it in rendered.of("NetworkPolicy") if matches(it["spec"]["podSelector"], pods.labels)]
    return {port["port"] for spec in of_pods for rule in spec.get("ingress", ()) for port in rule["ports"]}


def offers(rendered: Rendered, name: str) -> bool:
    return any(port["targetPort"] == name for it in rendered.of("Service") for port in it["spec"]["ports"])


@INVARIANTS.check
def prometheus_is_sent_to_every_server(rendered: Rendered) -> Iterator[str]:
    monitors = rendered.of("PodMonitor")
    for monitor in monitors:
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            for pods in rendered.selected(monitor["spec"]["selector"]):
                if pods.find_port(endpoint["port"]) is None or endpoint.get("path", "/metrics") != "/metrics":
                    yield f"{name_of(monitor)}: {pods} has no {endpoint}"
    for pods in rendered.servers() if monitors else ():
        of_pods = [it["spec"] for it in monitors if matches(it["spec"]["selector"], pods.labels)]
        ports = sorted(endpoint["port"] for spec in of_pods for endpoint in spec["podMetricsEndpoints"])
        if ports != ["health", "metrics"]:
            yield f"{pods}: scraped at {ports}"


@INVARIANTS.check
def routes_lead_to_services(rendered: Rendered) -> Iterator[str]:
    listeners = {
        (gateway["metadata"]["name"], listener["name"])
        for gateway in rendered.of("Gateway")
        for listener in gateway["spec"]["listeners"]
    }
    ports = {
        (service["metadata"]["name"], port["port"]): port["name"]
        for service in rendered.of("Service")
        for port in service["spec"]["ports"]
    }
    for kind, wanted in (("GRPCRoute", "grpc"), ("HTTPRoute", "http")):
        for route in rendered.of(kind):
            for parent in route["spec"]["parentRefs"]:
                if (parent["name"], parent["sectionName"]) not in listeners:
                    yield f"{name_of(route)} has no gateway {parent}"
            for backend in (backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]):
                if ports.get((backend["name"], backend["port"])) != wanted:
                    yield f"{name_of(route)} leads to {backend}"


@INVARIANTS.check
def methods_of_routes_are_tritons(rendered: Rendered) -> Iterator[str]:
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for route in rendered.of("GRPCRoute"):
        for match in (match["method"] for rule in route["spec"]["rules"] for match in rule["matches"]):
            if match["service"] != service.full_name or match["method"] not in service.methods_by_name:
                yield f"{name_of(route)}: {match}"


@INVARIANTS.check
def weights_add_up_and_a_canary_has_some(rendered: Rendered) -> Iterator[str]:
    canaries = [pods for pods in rendered.servers() if pods.labels["millibert.io/track"] == "canary"]
    for route in rendered.of("GRPCRoute", "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            weights = [backend["weight"] for backend in rule["backendRefs"]]
            if sum(weights) != 100 or len(weights) != (2 if canaries else 1) or max(weights) != weights[0]:
                yield f"{name_of(route)}: {weights}"


@INVARIANTS.check
def who_asks_waits_longest(rendered: Rendered) -> Iterator[str]:
    """A client more than the gateway, and a gateway more than the queue: each hears why it was in vain."""
    queue = Serving().queue_timeout_microseconds / 1e6
    for route in rendered.of("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            request, backend = (seconds(rule["timeouts"][name]) for name in ("request", "backendRequest"))
            if not DEFAULT_TIMEOUT > request >= backend > queue:
                yield f"{name_of(route)}: {DEFAULT_TIMEOUT}, {rule['timeouts']}, {queue}"


# What each check must notice, in the overlay `canary`, which has most of them.
EVERY_SERVER = {"app.kubernetes.io/component": "server"}
BREAKAGES: dict[Check, list[Breakage]] = {
    services_lead_to_ports_of_servers: [
        changed("Service", "spec/selector", {"app.kubernetes.io/component": "servers"}),
        changed("Service", "spec/selector", EVERY_SERVER),
        changed("Service", "spec/ports/0/targetPort", "https"),
        changed("Service", "spec/ports/0/port", 80),
    ],
    every_server_is_reached: [
        without("Service"),
        lambda it: [service["spec"].update(clusterIP="10.0.0.1") for service in it.of("Service")],
    ],
    network_policies_let_in_what_is_meant_to_come: [
        without("NetworkPolicy"),
        lambda it: it.get("NetworkPolicy", "server")["spec"].update(podSelector={"matchLabels": {"a": "b"}}),
        lambda it: it.get("NetworkPolicy", "server")["spec"]["ingress"].pop(),
        lambda it: it.get("NetworkPolicy", "server")["spec"]["ingress"][0]["ports"][0].update(port="https"),
    ],
    prometheus_is_sent_to_every_server: [
        changed("PodMonitor", "spec/podMetricsEndpoints/0/port", "http-metrics"),
        changed("PodMonitor", "spec/podMetricsEndpoints/0/path", "/prometheus"),
        changed("PodMonitor", "spec/selector", {"matchLabels": {"millibert.io/track": "stable"}}),
    ],
    routes_lead_to_services: [
        changed("GRPCRoute", "spec/rules/0/backendRefs/0/port", 8000),
        changed("HTTPRoute", "spec/rules/0/backendRefs/0/name", "triton"),
        changed("HTTPRoute", "spec/parentRefs/0/sectionName", "https"),
    ],
    methods_of_routes_are_tritons: [changed("GRPCRoute", "spec/rules/0/matches/0/method/method", "Infer")],
    weights_add_up_and_a_canary_has_some: [
        changed("GRPCRoute", "spec/rules/0/backendRefs/0/weight", 100),
        changed("HTTPRoute", "spec/rules/0/backendRefs/1/weight", 0),
    ],
    who_asks_waits_longest: [
        changed("HTTPRoute", "spec/rules/0/timeouts", {"request": "30s", "backendRequest": "5s"}),
        changed("HTTPRoute", "spec/rules/0/timeouts", {"request": "5s", "backendRequest": "6s"}),
        changed("HTTPRoute", "spec/rules/0/timeouts", {"request": "900ms", "backendRequest": "900ms"}),
    ],
}

test_it_holds_in_every_overlay = INVARIANTS.hold()
test_an_overlay_in_which_it_does_not_hold_is_found_out = INVARIANTS.can_fail({"canary": BREAKAGES})
