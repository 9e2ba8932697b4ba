"""The Kubernetes manifests as tests see them: which components go together, rendered by kubectl, and found again.

rendered = render(OVERLAYS["prod-cpu"])
rendered.servers(), rendered.pods(), rendered.of("Service"), rendered.get("Service", "millibert")
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from millibert.cli import COMMANDS

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
BASE = K8S / "base"
COMPONENTS = K8S / "components"
OVERLAYS = {path.parent.name: path.parent for path in sorted((K8S / "overlays").glob("*/kustomization.yaml"))}
NAMESPACE = "millibert"
SERVER = {"app.kubernetes.io/name": "millibert", "app.kubernetes.io/component": "server"}

# The rules of combination, all of them. Components, in an order that is right for any of them.
ORDER = (
    "gateway-grpc",
    "engine-build",
    "canary",
    "engine-build/canary",
    "gpu",
    "mig",
    "model-store-pvc",
    "model-store-s3",
    "model-store-image",
    "tls",
    "admin-lock",
    "otel",
    "priority",
    "hpa-cpu",
    "keda",
    "monitoring",
    "images",
)
# In place of another, where there are several pools.
OF_POOLS = {"engine-build/names": "engine-build"}
# One of each at most.
MODEL_STORES = frozenset({"model-store-pvc", "model-store-s3", "model-store-image"})
AUTOSCALERS = frozenset({"hpa-cpu", "keda"})
ALTERNATIVES = (MODEL_STORES, AUTOSCALERS)
# What a component patches or needs from others, and what several need together.
NEEDS = {
    frozenset({"canary"}): {"gateway-grpc"},
    frozenset({"mig"}): {"gpu"},
    frozenset({"engine-build"}): {"gpu"},
    frozenset({"engine-build/canary"}): {"engine-build", "canary"},
    frozenset({"engine-build", "canary"}): {"engine-build/canary"},
    frozenset[str](): {"images"},
}
# What makes Deployments or Jobs comes before what patches them, and names of images become real at the end.
MAKERS = {"engine-build", "canary", "engine-build/canary"}
AFTER = {
    "canary": {"gateway-grpc", "engine-build"},
    "engine-build/canary": {"engine-build", "canary"},
    **dict.fromkeys([*MODEL_STORES, "gpu", "admin-lock", "otel", "priority"], MAKERS),
    "tls": {*MAKERS, "gateway-grpc"},
    "mig": {*MAKERS, "gpu"},
    "images": set(ORDER),
}

# An object as YAML has it: dicts, lists and scalars.
Document = Any


def complete(names: Iterable[str]) -> tuple[str, ...]:
    """Add what they need and what is always there; in order."""
    wanted = set(names)
    while more := {need for cause, needs in NEEDS.items() if cause <= wanted for need in needs} - wanted:
        wanted |= more
    assert wanted <= set(ORDER), f"no such component: {wanted - set(ORDER)}"
    return tuple(name for name in ORDER if name in wanted)


def is_sensible(names: Iterable[str]) -> bool:
    """Return whether no two of them are alternatives of each other."""
    return all(len(group & set(names)) <= 1 for group in ALTERNATIVES)


def is_ordered(names: Sequence[str]) -> bool:
    """Return whether nothing comes before what it must come after."""
    return not any(AFTER.get(name, set()) & set(names[place + 1 :]) for place, name in enumerate(names))


def combinations() -> list[tuple[str, ...]]:
    """Each component alone, each pair, and everything at once for each choice among the alternatives."""
    shared = set(ORDER) - MODEL_STORES - AUTOSCALERS
    all_at_once = [shared | set(choice) for choice in itertools.product(sorted(MODEL_STORES), sorted(AUTOSCALERS))]
    few = [chosen for number in range(3) for chosen in itertools.combinations(ORDER, number)]
    completed = [complete(names) for names in (*few, *all_at_once)]
    return list(dict.fromkeys(names for names in completed if is_sensible(names)))


def need(tool: str) -> str:
    """Return the path of a command; skip the test where it is not installed."""
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"no {tool} on this machine")
    return found


def components_of(overlay: Path) -> tuple[str, ...]:
    """Return the names of the components that an overlay lists, in its order."""
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    paths = [(overlay / component).resolve() for component in kustomization["components"]]
    names = [str(path.relative_to(COMPONENTS)) for path in paths]
    return tuple(OF_POOLS.get(name, name) for name in names)


class RenderError(Exception):
    """What kubectl said."""


@cache
def render(folder: Path) -> Rendered:
    """Render a kustomization: `kubectl kustomize`. What is returned is shared: `mutated` makes a copy."""
    done = subprocess.run([need("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    # kustomize warns of what will be an error one day.
    if done.returncode or done.stderr:
        raise RenderError(done.stderr)
    return Rendered(list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)))


def applied_by_hand() -> Rendered:
    """Return the Pods that no kustomization lists: a person applies them, and deletes them when they are done."""
    documents = [it for path in sorted(K8S.rglob("*.yaml")) for it in yaml.safe_load_all(path.read_text())]
    return Rendered([it for it in documents if isinstance(it, dict) and it.get("kind") == "Pod"])


def overlay_of(names: Iterable[str], folder: Path) -> Path:
    """Write an overlay of the base and these components, in the order given, into a folder of its own."""
    # kubectl wants relative paths, and follows links before it counts `..`.
    place = folder.resolve() / "+".join(names).replace("/", "-")
    place.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(BASE, place)],
        "components": [os.path.relpath(COMPONENTS / name, place) for name in names],
    }
    (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return place


# What the checks are of: every overlay, and the components that are in none, all together.
STACKS = {
    "everything-s3-hpa": frozenset(ORDER) - {"model-store-pvc", "model-store-image", "keda"},
    "everything-image-keda": frozenset(ORDER) - {"model-store-pvc", "model-store-s3", "hpa-cpu"},
}
SUBJECTS = (*OVERLAYS, *STACKS)


@cache
def render_subject(name: str) -> Rendered:
    """Render an overlay or a stack by its name."""
    if name in OVERLAYS:
        return render(OVERLAYS[name])
    with tempfile.TemporaryDirectory() as folder:
        return render(overlay_of(complete(STACKS[name]), Path(folder)))


@dataclass(frozen=True)
class Pods:
    """The Pods that a Deployment or a Job makes, or one by itself."""

    owner: Document
    template: Document

    def __str__(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"].get("labels", {})
        return labels

    @property
    def spec(self) -> Document:
        return self.template["spec"]

    @property
    def containers(self) -> list[Document]:
        """All of them, in the order in which they start."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def main(self) -> Document:
        return self.spec["containers"][0]

    def command(self, name: str) -> Document:
        """Return the container that runs `millibert NAME`."""
        (found,) = (it for it in self.containers if it.get("args", [""])[0] == name)
        return found

    def volume(self, name: str) -> Document:
        (found,) = (volume for volume in self.spec["volumes"] if volume["name"] == name)
        return found

    def port(self, name_or_number: str | int) -> int:
        """Return the number of a port of the main container; KeyError when it has none such."""
        found = self.find_port(name_or_number)
        if found is None:
            raise KeyError(f"{self} has no port {name_or_number}")
        return found

    def find_port(self, name_or_number: str | int) -> int | None:
        """Return the number of a port of the main container; None when it has none such."""
        for port in self.main.get("ports", ()):
            if name_or_number in (port["name"], port["containerPort"]):
                return int(port["containerPort"])
        return None

    def option(self, name: str) -> str:
        """Return the value of `--NAME=VALUE` in the main container's arguments; the last counts, as for Triton."""
        values: list[str] = [text.partition("=")[2] for text in self.main["args"] if text.startswith(f"--{name}=")]
        if not values:
            raise KeyError(f"{self} has no --{name}")
        return values[-1]


def parse(arguments: list[str]) -> argparse.Namespace | None:
    """Parse a command line as `millibert` does; None when it would refuse."""
    if arguments[0] not in COMMANDS:
        return None
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[arguments[0]].module).configure(parser)
    try:
        return parser.parse_args(arguments[1:])
    except SystemExit:
        return None


class Rendered:
    """The objects of one overlay."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def of(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] in kinds]

    def get(self, kind: str, name: str) -> Document:
        (found,) = (document for document in self.of(kind) if document["metadata"]["name"] == name)
        return found

    def pods(self) -> list[Pods]:
        return [Pods(it, it["spec"].get("template", it)) for it in self.of("Deployment", "Job", "Pod")]

    def servers(self) -> list[Pods]:
        return [
            pods for pods in self.pods() if pods.owner["kind"] == "Deployment" and SERVER.items() <= pods.labels.items()
        ]

    def builders(self) -> list[Pods]:
        """The Jobs that build engines."""
        return [pods for pods in self.pods() if pods.owner["kind"] == "Job"]

    def selected(self, selector: Document) -> list[Pods]:
        """Return the Pods that a LabelSelector picks."""
        return [pods for pods in self.pods() if matches(selector, pods.labels)]

    def mutated(self, change: Callable[[Rendered], object]) -> Rendered:
        """Return a copy in which something is different."""
        other = Rendered(copy.deepcopy(self.documents))
        change(other)
        return other


def name_of(document: Document) -> str:
    """Return `KIND/NAME`."""
    return f"{document['kind']}/{document['metadata']['name']}"


def listed(pods: list[Pods]) -> str:
    return ", ".join(map(str, pods)) or "nothing"


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Return whether a LabelSelector picks what has these labels; an empty one picks everything."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}, selector
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(_holds(expression, labels) for expression in selector.get("matchExpressions", ()))


def _holds(expression: Document, labels: dict[str, str]) -> bool:
    value = labels.get(expression["key"])
    match expression["operator"]:
        case "In":
            return value in expression["values"]
        case "NotIn":
            return value not in expression["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise ValueError(f"no such operator: {other}")


_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str | float) -> float:
    """Return a Kubernetes quantity (`500m`, `2Gi`) as a number."""
    match = re.fullmatch(r"([\d.]+)(\D*)", str(text))
    assert match, text
    return float(match[1]) * _UNITS[match[2]]


def seconds(text: str) -> float:
    """Return a duration of the Gateway API (`5s`, `1m30s`, `500ms`) in seconds."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    assert re.fullmatch(r"(\d+(h|m|s|ms))+", text), text
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|h|m|s)", text))
