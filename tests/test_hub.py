"""Data sets from a hub: the real client of the hub against a small hub of our own, over HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

pa = pytest.importorskip("pyarrow")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The hub's client tries five times, and waits for 23 s in all.
AT_ONCE = "import time; time.sleep = lambda seconds: None"
LOAD = """
import json, sys
from millibert import UsageError
from millibert_build.dataset import load_examples
from millibert_build.scenario import Data
source = f"hub:{sys.argv[1]}"
try:
    found = load_examples(source, sys.argv[2], Data(train=source, test=source), "single_label")
    print(json.dumps([[example.text, *example.labels] for example in found]))
except UsageError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Serves `shop/intents`, whose labels are integers with names in the schema, in two files."""
    import pyarrow.parquet as pq

    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    files = {}
    for number, (text, label) in enumerate((("sure", 1), ("never", 0))):
        path = tmp_path_factory.mktemp("hub") / "part.parquet"
        table = pa.Table.from_pylist([{"text": text, "label": label}])
        pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(features).encode()}), path)
        files[f"default/train/{number:04}.parquet"] = path.read_bytes()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if path == "/api/datasets/shop/intents/tree/refs/convert/parquet":
                listing = [{"type": "file", "path": name, "oid": "0", "size": len(files[name])} for name in files]
                self.answer(json.dumps(listing).encode(), "application/json")
            elif (name := path.rpartition("/refs/convert/parquet/")[2]) in files:
                self.answer(files[name], "application/octet-stream")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def load(endpoint: str, home: Path, dataset: str, split: str, script: str = LOAD):
    # The client reads its settings when it is imported, hence a process of its own.
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, dataset, split], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_split_comes_with_its_label_names_in_the_order_of_its_files(hub, tmp_path):
    assert load(hub, tmp_path, "shop/intents", "train") == [["sure", "yes"], ["never", "no"]]


def test_a_split_that_the_data_set_lacks(hub, tmp_path):
    assert "hub:shop/intents: no split 'test'" in load(hub, tmp_path, "shop/intents", "test")


def test_a_data_set_that_is_not_there(hub, tmp_path):
    assert "hub:shop/nothing: no such data set on the hub" in load(hub, tmp_path, "shop/nothing", "train")


def test_a_hub_that_is_not_there(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    message = load(f"http://127.0.0.1:{port}", tmp_path, "shop/intents", "train", script=AT_ONCE + LOAD)
    assert "hub:shop/intents: cannot fetch it" in message
    assert "a local copy (.csv, .jsonl) works too" in message
