"""What must be true between a Pod's numbers, and between them and the code that runs in it, in every overlay."""

from __future__ import annotations

import functools
import http.client
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import text_format
from tests.invariants import Breakage, Check, Invariants
from tests.manifests import Document, Pods, Rendered, parse, quantity
from tritonclient.grpc import model_config_pb2

from millibert._asking import DEFAULT_TIMEOUT
from millibert._errors import UsageError
from millibert_ensemble import contract, installation
from millibert_ensemble.health import Health
from millibert_ensemble.health_server import HealthServer
from millibert_ensemble.server import START_SECONDS
from millibert_ensemble.supervisor import PATIENCE_SECONDS

MARGIN_SECONDS = 5
MIB = 2**20
MODELS = Path(contract.__file__).with_name("models")
ADMIN_APIS = {"model-repository", "shared-memory", "trace", "logging"}

INVARIANTS = Invariants()


def pre_stop_seconds(pods: Pods) -> float:
    hook = pods.main["lifecycle"]["preStop"]
    if "sleep" in hook:
        return float(hook["sleep"]["seconds"])
    command, argument = hook["exec"]["command"]
    assert command == "sleep"
    return float(argument)


@INVARIANTS.check
def there_is_time_to_go(rendered: Rendered) -> Iterator[str]:
    """preStop, then the drain, then the supervisor's patience with a drain that hangs."""
    for pods in rendered.servers():
        drain = int(pods.option("drain-seconds"))
        needed = pre_stop_seconds(pods) + drain + PATIENCE_SECONDS + MARGIN_SECONDS
        granted = pods.spec["terminationGracePeriodSeconds"]
        if granted < needed:
            yield f"{pods}: {granted} s to go, {needed} s needed"


@INVARIANTS.check
def calls_in_flight_outlast_nothing(rendered: Rendered) -> Iterator[str]:
    """Neither a drain nor a connection that is too old cuts off a call that its client still waits for."""
    for pods in rendered.servers():
        for option, seconds in (("drain-seconds", 1), ("grpc-max-connection-age-grace", 1e-3)):
            if int(pods.option(option)) * seconds < DEFAULT_TIMEOUT:
                yield f"{pods}: clients wait {DEFAULT_TIMEOUT} s, --{option}={pods.option(option)}"


@functools.cache
def is_answered(path: str) -> bool:
    """Ask a real health server, which says 404 to what it does not know."""
    with HealthServer(Health(), "127.0.0.1", 0) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", path)
        status = connection.getresponse().status
        connection.close()
    return status != http.client.NOT_FOUND


@INVARIANTS.check
def probes_ask_what_exists(rendered: Rendered) -> Iterator[str]:
    # To kill what is not ready, but busy or starting, would make everything worse.
    meant = {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/live"}
    for pods in rendered.servers():
        for probe, path in meant.items():
            get = pods.main[probe]["httpGet"]
            if pods.find_port(get["port"]) != int(pods.option("health-port")):
                yield f"{pods}: {probe} asks at {get['port']}, not at the health port"
            if get["path"] != path or not is_answered(path):
                yield f"{pods}: {probe} asks for {get['path']}"


@INVARIANTS.check
def a_start_may_take_its_time(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        probe = pods.main["startupProbe"]
        budget = probe["periodSeconds"] * probe["failureThreshold"]
        if budget < START_SECONDS:
            yield f"{pods}: killed after {budget} s of a start that may take {START_SECONDS}"
        preflight = parse(pods.command("preflight")["args"])
        waits = getattr(preflight, "wait", 0) or 0
        if pods.owner["spec"]["progressDeadlineSeconds"] <= waits + budget:
            yield f"{pods}: a rollout is called failed while a Pod may still start"


@INVARIANTS.check
def a_rollout_takes_nothing_away(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        update = pods.owner["spec"]["strategy"]["rollingUpdate"]
        if update["maxUnavailable"] != 0 or update["maxSurge"] in (0, "0%"):
            yield f"{pods}: {update}"


@INVARIANTS.check
def resources_are_guaranteed_and_whole_cores(rendered: Rendered) -> Iterator[str]:
    """The engine has a thread for each core of the limit (models/bert/threads.py): half a core would be throttled."""
    for pods in rendered.pods():
        for container in pods.containers:
            resources = container["resources"]
            # Devices, whose names have a slash, are requested by their limit.
            devices = {name: amount for name, amount in resources["limits"].items() if "/" in name}
            if {**devices, **resources["requests"]} != resources["limits"]:
                yield f"{pods}: {container['name']} may use more than it asked for"
            if quantity(resources["limits"]["cpu"]) % 1 or "memory" not in resources["limits"]:
                yield f"{pods}: {container['name']} has {resources['limits']}"


@INVARIANTS.check
def volumes_are_bounded_by_what_the_pod_may_use(rendered: Rendered) -> Iterator[str]:
    """Memory-backed ones count towards the memory limit, the others towards that of ephemeral storage."""
    for pods in rendered.pods():
        empty = {volume["name"]: volume["emptyDir"] for volume in pods.spec["volumes"] if "emptyDir" in volume}
        yield from (f"{pods}: {name} has no limit" for name, it in empty.items() if "sizeLimit" not in it)
        sizes: dict[str, float] = {"memory": 0.0, "ephemeral-storage": 0.0}
        for it in empty.values():
            sizes["memory" if it.get("medium") == "Memory" else "ephemeral-storage"] += quantity(it.get("sizeLimit", 0))
        limits = [container["resources"]["limits"] for container in pods.spec["containers"]]
        # Half of the memory is for the processes.
        for resource, share in (("memory", 0.5), ("ephemeral-storage", 1.0)):
            allowed = share * sum(quantity(limit.get(resource, 0)) for limit in limits)
            if sizes[resource] > allowed:
                yield f"{pods}: volumes of {sizes[resource]:.0f} bytes of {resource}, {allowed:.0f} allowed"


@INVARIANTS.check
def volumes_have_one_source_and_are_mounted(rendered: Rendered) -> Iterator[str]:
    """Two sources are what is left when two components patch one volume."""
    for pods in rendered.pods():
        names = {volume["name"] for volume in pods.spec["volumes"]}
        for volume in pods.spec["volumes"]:
            if len(volume) != 2:
                yield f"{pods}: {volume}"
        mounted = {mount["name"] for container in pods.containers for mount in container["volumeMounts"]}
        if names != mounted:
            yield f"{pods}: volumes {names}, mounted {mounted}"


# The largest text that a gateway should let through (components/gateway-grpc), and generous guesses at a release.
TEXT_BYTES, TOKENS, LABELS, LABEL_BYTES = MIB, 512, 1000, 128
_ELEMENT_BYTES = {"TYPE_INT32": 4, "TYPE_INT64": 8, "TYPE_FP32": 4, "TYPE_BOOL": 1}


def shared_memory_needed() -> float:
    """Return how much /dev/shm Triton's Python backend takes for the models in models/, in bytes.

    Each instance has a region of its own, of 1 MiB at first (tried, 2.51). The largest batch goes through it, in and
    out: `max_batch_size` rows of every input and output. It grows in steps of 1 MiB and never shrinks, and the next
    batch is laid out while the last one is still there: 64 texts of 1 MB made the tokenizer's 125 MiB large.
    """
    needed = 0.0
    for name in contract.COMPOSING_MODELS:
        path = MODELS / name / "config.pbtxt"
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        row = sum(_row_bytes(tensor) for tensor in (*config.input, *config.output))
        instances = sum(group.count for group in config.instance_group)
        assert instances, f"{name} leaves the number of instances to Triton"
        needed += instances * (1 + math.ceil(2 * config.max_batch_size * row / MIB)) * MIB
    return needed


def _row_bytes(tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput) -> int:
    (size,) = tensor.dims
    of_tokens = tensor.name in (contract.INPUT_IDS.name, contract.SPAN.name)
    elements = size if size > 0 else TOKENS if of_tokens else LABELS
    datatype = model_config_pb2.DataType.Name(tensor.data_type)
    if datatype == "TYPE_STRING":
        # Four bytes of length before each.
        return int(elements) * (4 + (TEXT_BYTES if tensor.name == contract.TEXT.name else LABEL_BYTES))
    return int(elements) * _ELEMENT_BYTES[datatype]


@INVARIANTS.check
def shared_memory_is_enough_for_the_largest_batches(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        (mount,) = [mount for mount in pods.main["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        volume = pods.volume(mount["name"])["emptyDir"]
        if volume.get("medium") != "Memory" or quantity(volume["sizeLimit"]) < shared_memory_needed():
            yield f"{pods}: {volume}, {shared_memory_needed() / MIB:.0f} MiB needed"


def commands(rendered: Rendered) -> Iterator[tuple[Pods, Document]]:
    """Yield the containers that run `millibert`, the images' entry point."""
    for pods in rendered.pods():
        for container in pods.containers:
            if container["image"].rpartition("/")[2].startswith("millibert-") and "command" not in container:
                yield pods, container


@INVARIANTS.check
def arguments_are_those_of_the_commands(rendered: Rendered) -> Iterator[str]:
    found = list(commands(rendered))
    yield from (f"{pods}: {it['args']} is refused" for pods, it in found if parse(it["args"]) is None)
    if not {"preflight", "serve"} <= {it["args"][0] for _, it in found}:
        yield "no server, or no preflight"


@functools.cache
def options_of_tritonserver() -> frozenset[str]:
    try:
        binary = installation.locate()
    except UsageError as error:
        pytest.skip(str(error))
    # It prints them, and ends with status 1.
    text = subprocess.run([binary, "--help"], capture_output=True, text=True, check=False).stderr
    return frozenset(re.findall(r"^\s+--([a-z-]+) <", text, re.MULTILINE))


@INVARIANTS.check
def tritonserver_knows_its_options(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        parsed = parse(pods.main["args"])
        for option in parsed.triton_options if parsed else ():
            if option.partition("=")[0].removeprefix("--") not in options_of_tritonserver():
                yield f"{pods}: tritonserver has no {option}"


@INVARIANTS.check
def ports_are_those_it_listens_on(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        parsed = parse(pods.main["args"])
        for name in ("http", "grpc", "metrics", "health") if parsed else ():
            if pods.find_port(name) != getattr(parsed, f"{name}_port"):
                yield f"{pods}: port {name} is {pods.find_port(name)}"


@INVARIANTS.check
def what_preflight_lays_out_is_served(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        written, served = parse(pods.command("preflight")["args"]), parse(pods.main["args"])
        if written and served and written.out != served.repository:
            yield f"{pods}: preflight writes {written.out}, {served.repository} is served"
        read_only = {m["name"] for m in pods.main["volumeMounts"] if m.get("readOnly")}
        if not {"models", "repository"} <= read_only:
            yield f"{pods}: the server may change what it serves"


@INVARIANTS.check
def variables_in_arguments_are_set(rendered: Rendered) -> Iterator[str]:
    """Kubernetes leaves `$(NAME)` as it is when there is no such variable."""
    for pods in rendered.pods():
        for container in pods.containers:
            used = set(
                re.findall(r"\$\((\w+)\)", " ".join([*container.get("args", ()), *container.get("command", ())]))
            )
            names = {variable["name"] for variable in container.get("env", ())}
            if not used <= names:
                yield f"{pods}: {container['name']} lacks {used - names}"


@INVARIANTS.check
def what_changes_a_server_is_restricted(rendered: Rendered) -> Iterator[str]:
    for pods in rendered.servers():
        for option in ("http-restricted-api", "grpc-restricted-protocol"):
            apis, _, key = pods.option(option).partition(":")
            if not set(apis.split(",")) >= ADMIN_APIS or not key.endswith("=$(ADMIN_KEY)"):
                yield f"{pods}: --{option}={pods.option(option)}"
        (source,) = [it["valueFrom"] for it in pods.main["env"] if it["name"] == "ADMIN_KEY"]
        if source.keys() not in ({"secretKeyRef"}, {"fieldRef"}):
            yield f"{pods}: the key comes from {source}"
        for option in ("allow-sagemaker", "allow-vertex-ai"):
            if pods.option(option) != "false":
                yield f"{pods}: --{option}={pods.option(option)}"


# What each check must notice.


def spec(rendered: Rendered) -> Document:
    return rendered.servers()[0].spec


def main(rendered: Rendered) -> Document:
    return rendered.servers()[0].main


def limits(rendered: Rendered) -> Document:
    return main(rendered)["resources"]["limits"]


def with_argument(old: str, new: str) -> Breakage:
    def change(rendered: Rendered) -> None:
        before = main(rendered)["args"]
        main(rendered)["args"] = [text.replace(old, new) for text in before]
        assert main(rendered)["args"] != before

    return change


def with_volume(name: str, **source: Document) -> Breakage:
    def change(rendered: Rendered) -> None:
        volume = rendered.servers()[0].volume(name)
        volume.clear()
        volume.update(name=name, **source)

    return change


BREAKAGES: dict[Check, list[Breakage]] = {
    there_is_time_to_go: [
        lambda it: spec(it).update(terminationGracePeriodSeconds=49),
        lambda it: main(it)["lifecycle"].update(preStop={"sleep": {"seconds": 30}}),
        with_argument("--drain-seconds=30", "--drain-seconds=45"),
    ],
    calls_in_flight_outlast_nothing: [
        with_argument("--drain-seconds=30", "--drain-seconds=5"),
        with_argument("age-grace=30000", "age-grace=3000"),
    ],
    probes_ask_what_exists: [
        lambda it: main(it)["livenessProbe"]["httpGet"].update(path="/ready"),
        lambda it: main(it)["startupProbe"]["httpGet"].update(path="/v2/health/ready"),
        lambda it: main(it)["readinessProbe"]["httpGet"].update(port="http"),
        lambda it: main(it)["readinessProbe"]["httpGet"].update(port="healthy"),
    ],
    a_start_may_take_its_time: [
        lambda it: main(it)["startupProbe"].update(failureThreshold=200),
        lambda it: it.servers()[0].owner["spec"].update(progressDeadlineSeconds=600),
    ],
    a_rollout_takes_nothing_away: [
        lambda it: it.servers()[0].owner["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
        lambda it: it.servers()[0].owner["spec"]["strategy"]["rollingUpdate"].update(maxSurge=0),
    ],
    resources_are_guaranteed_and_whole_cores: [
        lambda it: limits(it).update(cpu="5"),
        lambda it: main(it).update(resources={"requests": {"cpu": "1500m"}, "limits": {"cpu": "1500m"}}),
    ],
    volumes_are_bounded_by_what_the_pod_may_use: [
        with_volume("dshm", emptyDir={"medium": "Memory", "sizeLimit": "3Gi"}),
        with_volume("dshm", emptyDir={"medium": "Memory"}),
        with_volume("tmp", emptyDir={"sizeLimit": "2Gi"}),
    ],
    volumes_have_one_source_and_are_mounted: [
        with_volume("models", emptyDir={}, persistentVolumeClaim={"claimName": "millibert-models"}),
        lambda it: spec(it)["volumes"].append({"name": "other", "emptyDir": {"sizeLimit": "1Mi"}}),
    ],
    shared_memory_is_enough_for_the_largest_batches: [
        with_volume("dshm", emptyDir={"medium": "Memory", "sizeLimit": "64Mi"}),
        with_volume("dshm", emptyDir={"sizeLimit": "1Gi"}),
    ],
    arguments_are_those_of_the_commands: [
        with_argument("--health-port", "--healthy-port"),
        with_argument("--drain-seconds=30", "--drain-seconds=soon"),
        with_argument("serve", "server"),
    ],
    tritonserver_knows_its_options: [with_argument("--allow-sagemaker", "--allow-sage-maker")],
    ports_are_those_it_listens_on: [
        with_argument("--health-port=8003", "--health-port=8004"),
        lambda it: main(it)["ports"].pop(0),
    ],
    what_preflight_lays_out_is_served: [
        with_argument("--repository=/repository/current", "--repository=/models/current"),
        lambda it: [mount.pop("readOnly", None) for mount in main(it)["volumeMounts"]],
    ],
    variables_in_arguments_are_set: [lambda it: main(it).update(env=[])],
    what_changes_a_server_is_restricted: [
        with_argument(",trace,logging", ""),
        with_argument("--allow-vertex-ai=false", "--allow-vertex-ai=true"),
        lambda it: main(it)["env"][0]["valueFrom"].update(configMapKeyRef={}),
    ],
}

test_it_holds_in_every_overlay = INVARIANTS.hold()
test_an_overlay_in_which_it_does_not_hold_is_found_out = INVARIANTS.can_fail({"prod-cpu": BREAKAGES})
