"""The container files: one place for versions, no root, nothing of TensorRT assumed. They are not built here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "k8s" / "image"
BAKE = (IMAGES / "docker-bake.hcl").read_text(encoding="utf-8")
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
VERSIONS = dict(re.findall(r'variable "(\w+)" \{ default = "([^"]*)" \}', BAKE))


def targets():
    return {
        name: (re.search(r'dockerfile = "(.+)"', body), re.findall(r"^    (\w+) +=", body, re.MULTILINE))
        for name, body in re.findall(r'target "(\w+)" \{(.*?)\n\}', BAKE, re.DOTALL)
    }


def test_every_dockerfile_is_a_target_and_gets_every_argument_it_declares():
    found = {}
    for match, arguments in targets().values():
        path = ROOT / match.group(1)
        declared = set(re.findall(r"^ARG (\w+)$", path.read_text(), re.MULTILINE))
        assert declared == set(arguments)
        assert declared <= set(VERSIONS)
        found[path] = declared
    assert sorted(found) == DOCKERFILES


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_no_version_stands_in_a_dockerfile(path):
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert not re.findall(r"==(?!\$\{)|:\d\d\.\d\d|ARG \w+=", text)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_last_user_is_not_root(path):
    users = re.findall(r"^USER (\S+)", path.read_text(), re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_is_there_and_not_ignored(path):
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (.+) \S+$", path.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert source in allowed


def test_packages_are_those_that_the_tests_run_with():
    pins = dict(line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().split() if "==" in line)
    for name in ("NUMPY", "TOKENIZERS", "OPENVINO", "ONNXRUNTIME", "ONNX", "POLYGRAPHY", "PROMETHEUS_CLIENT", "PSUTIL"):
        assert VERSIONS[name] == pins[name.lower()], name


def test_both_images_are_of_one_month():
    bases = [re.findall(r"^FROM (\S+)$", path.read_text(), re.MULTILINE)[-1] for path in DOCKERFILES]
    assert all(base.endswith(":${NVIDIA_MONTH}-py3") for base in bases)
    assert "tensorrt" not in " ".join(VERSIONS).lower()


def test_the_manifests_have_the_tag_that_is_built():
    images = (ROOT / "k8s" / "components" / "images" / "kustomization.yaml").read_text(encoding="utf-8")
    tags = dict(re.findall(r"name: (millibert-(?:serve|engine)), newTag: ([\w.-]+)", images))
    assert tags == {f"millibert-{target}": VERSIONS["TAG"] for target in targets()}
