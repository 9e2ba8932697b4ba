"""A kubelet for one Pod, on this machine: runs what a rendered Pod template says, but for the image.

It lays out the volumes as folders, fills in environment variables and arguments, runs the initContainers and then the
server, on free ports; asks its probes; and ends it as Kubernetes does: preStop, SIGTERM, and after the grace SIGKILL.

    with Pod(template, models=folder, config={"release": {"MODEL_RELEASE": "one"}}) as pod:
        pod.probe("readinessProbe")
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.manifests import Document, Pods

# The images' entry point, as this environment has it.
_ENTRYPOINT = [sys.executable, "-m", "millibert.cli"]
_VARIABLE = re.compile(r"\$\((\w+)\)")


class Pod:
    """The Pod of a Deployment; started by `with`. `models` is what the volume of that name holds."""

    def __init__(self, pods: Pods, folder: Path, models: Path, config: dict[str, dict[str, str]]) -> None:
        self.spec = pods.spec
        self.container = pods.main
        self.grace_seconds = float(self.spec["terminationGracePeriodSeconds"])
        self.log_file = folder / "log"
        self.uid = str(uuid.uuid4())
        self._pods = pods
        self._config = config
        self._volumes = {volume["name"]: folder / volume["name"] for volume in self.spec["volumes"]}
        self._volumes["models"] = models
        for place in self._volumes.values():
            place.mkdir(parents=True, exist_ok=True)

    def initialise(self) -> subprocess.CompletedProcess[str]:
        """Run the initContainers; returns the first that fails, or the last."""
        for container in self.spec["initContainers"]:
            command, environment = self._command(container)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                break
        return done

    def __enter__(self) -> Pod:
        done = self.initialise()
        assert done.returncode == 0, done.stdout + done.stderr
        command, environment = self._command(self.container)
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                self._on_free_ports(command), env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_started(self) -> None:
        """Until the server says where it listens; its startup probe must say yes then."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"ended with {self.process.wait()}:\n{self.log_file.read_text()}"
        facts = json.loads(line)
        urls = {name: facts[name] for name in ("http", "grpc", "metrics", "health")}
        self.urls = {**urls, "metrics": urls["metrics"].removesuffix("/metrics")}
        self.models: list[str] = facts["models"]
        self.server_pid: int = facts["server_pid"]

    def probe(self, name: str) -> bool:
        """Ask a probe once, as a kubelet would: anything but 200 to 399 in time is a failure."""
        probe = self.container[name]
        action = probe["httpGet"]
        assert isinstance(action["port"], str), "ports have other numbers here: the probe must name them"
        self._pods.port(action["port"])
        try:
            with urllib.request.urlopen(self.urls[action["port"]] + action["path"], timeout=probe["timeoutSeconds"]):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def wait_probe(self, name: str, wanted: bool) -> None:
        """Ask every now and then until the answer is the wanted one; the test's own time limit ends what never is."""
        while self.probe(name) is not wanted:
            time.sleep(0.05)

    def run_pre_stop(self) -> float:
        """Run the preStop hook; returns the seconds that it took of the grace."""
        start = time.monotonic()
        subprocess.run(self.container["lifecycle"]["preStop"]["exec"]["command"], check=True)
        return time.monotonic() - start

    def terminate(self, seconds_left: float) -> int:
        """SIGTERM; returns the exit status. What has not ended when the grace is over is killed: TimeoutExpired."""
        self.process.terminate()
        return self.process.wait(seconds_left)

    def _command(self, container: Document) -> tuple[list[str], dict[str, str]]:
        given = {item["name"]: self._value(item) for item in container.get("env", ())}
        arguments = [_VARIABLE.sub(lambda match: given[match[1]], text) for text in container["args"]]
        places = {mount["mountPath"]: self._volumes[mount["name"]] for mount in container["volumeMounts"]}
        return [*_ENTRYPOINT, *(_relocated(text, places) for text in arguments)], {**os.environ, **given}

    def _value(self, item: Document) -> str:
        source: dict[str, Any] = item.get("valueFrom", {})
        match list(source):
            case ["configMapKeyRef"]:
                name = re.sub(r"-[a-z0-9]{10}$", "", source["configMapKeyRef"]["name"])
                return self._config[name][source["configMapKeyRef"]["key"]]
            case ["secretKeyRef"]:
                return self._config[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
            case ["fieldRef"]:
                return {"metadata.uid": self.uid}[source["fieldRef"]["fieldPath"]]
        return str(item["value"])

    def _on_free_ports(self, command: list[str]) -> list[str]:
        """The same on ports that are free here, which it prints: they are the only thing that two Pods would share."""
        at = command.index("serve") + 1
        free = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
        moved = [re.sub(r"^--(health|http|grpc|metrics)-port=\d+$", r"--\1-port=0", text) for text in command]
        return [*moved[:at], "--json", *free, *moved[at:]]


def _relocated(argument: str, places: dict[str, Path]) -> str:
    option, equals, value = argument.rpartition("=")
    for mounted, place in places.items():
        if value == mounted or value.startswith(f"{mounted}/"):
            return f"{option}{equals}{place}{value.removeprefix(mounted)}"
    return argument
