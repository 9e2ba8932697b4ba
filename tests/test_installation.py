"""Finding Triton and a Python that can run its models, and what is said where there is none."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from millibert._errors import UsageError
from millibert_ensemble import installation

if TYPE_CHECKING:
    from tests.conftest import RunningServer

    Triton = Callable[..., contextlib.AbstractContextManager[RunningServer]]


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        ({"numpy": "2.1.0"}, "pip install 'numpy<2'"),
        ({"numpy": None}, "pip install 'numpy<2'"),
        ({"libpython": None}, "apt-get install libpython"),
        ({"python": "3.9"}, "virtual environment"),
    ],
)
def test_a_python_that_cannot_run_models_is_refused(
    triton: Triton,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: dict[str, str | None],
    advice: str,
) -> None:
    """The interpreter beside `sys.executable` is asked; here it is one that gives the wrong answer."""
    del triton
    if shutil.which("tritonserver") or installation.SYSTEM_BINARY.exists():
        pytest.skip("a system's tritonserver brings its own Python")
    good = {"python": f"3.{sys.version_info.minor}", "numpy": "1.26.4", "libpython": "libpython3.so"}
    interpreter = tmp_path / "python3"
    interpreter.write_text(f"#!/bin/sh\necho '{json.dumps({**good, **answer})}'\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(UsageError) as refused:
        installation.prepare(tmp_path)
    assert advice in str(refused.value)


def test_without_tritonserver_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation, "SYSTEM_BINARY", tmp_path / "tritonserver")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as refused:
        installation.locate()
    assert "pip install 'millibert[serve]'" in str(refused.value)
