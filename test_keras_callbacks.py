"""Tests of keras_callbacks: real models, real `fit`, and the real huggingface_hub client.

The Hub is a stand-in: an HTTP server on loopback, below, which keeps repositories in memory, checks what
it is sent as the real one does, and fails on demand. Classes that need a library which an environment
lacks are not collected there.
"""

import base64
import collections
import contextlib
import copy
import csv
import hashlib
import http.server
import importlib.util
import inspect
import json
import logging
import math
import os
import pathlib
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import warnings

HERE = pathlib.Path(__file__).resolve().parent

# The stand-in Hub: what the real client needs, over real HTTP, with faults on demand.
class Fault:
    """What the stand-in does instead of answering, for the next `times` requests of a stage."""

    def __init__(self, stage, kind, times=1, headers=None, body=b"no"):
        self.stage, self.kind, self.times = stage, kind, times
        self.headers, self.body = headers or {}, body
        self.reached, self.release = threading.Event(), threading.Event()


class Hub:
    """Repositories in memory behind an HTTP server on loopback."""

    TOKENS = {"hf_write": ("user", "write"), "hf_read": ("user", "read"), "hf_other": ("other", "write")}
    STAGES = {
        "create": r"POST /api/repos/create",
        "info": r"GET /api/models/",
        "preupload": r"POST /api/models/.*/preupload/",
        "batch": r"POST /.*\.git/info/lfs/objects/batch",
        "lfs": r"PUT /lfs/",
        "commit": r"POST /api/models/.*/commit/",
        "yaml": r"POST /api/validate-yaml",
        "resolve": r"(GET|HEAD) /.*/resolve/",
    }

    def __init__(self):
        hub = self

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that went away

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                hub.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *args):
                pass

        self.lock = threading.RLock()
        self.reset()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        with self.lock:
            for fault in getattr(self, "faults", []):
                fault.release.set()
            self.repos, self.objects, self.faults, self.requests = {}, {}, [], []
            self.down = False

    def add_fault(self, *args, **kwargs):
        fault = Fault(*args, **kwargs)
        self.faults.append(fault)
        return fault

    # What tests look at
    def commits(self, repo_id):
        """The messages of the commits, the first one of all left out."""
        return [commit["message"] for commit in self.repos[repo_id]][1:]

    def files(self, repo_id, index=-1):
        return self.repos[repo_id][index]["files"]

    def commit(self, repo_id, message, changes, deletions=()):
        with self.lock:
            history = self.repos.setdefault(repo_id, [])
            files = {**(history[-1]["files"] if history else {}), **changes}
            for name in deletions:
                files.pop(name)
            oid = hashlib.sha1(f"{repo_id} {len(history)} {message}".encode()).hexdigest()
            history.append({"oid": oid, "message": message, "files": files})
            return oid

    # The server's side
    def handle(self, request):
        with self.lock:
            line = f"{request.command} {request.path}"
            stage = next((name for name, pattern in self.STAGES.items() if re.match(pattern, line)), "other")
            self.requests.append((stage, line))
            fault = next((f for f in self.faults if f.stage in (stage, "any") and f.times > 0), None)
            if fault:
                fault.times -= 1
        if self.down:
            return self.drop(request)
        if fault and fault.kind == "drop":
            request.rfile.read(min(10, int(request.headers.get("Content-Length") or 0)))
            fault.reached.set()
            return self.drop(request)
        body = self.read_body(request)
        if fault:
            fault.reached.set()
            if fault.kind in ("hang", "wait"):  # never answers; or answers once it is released
                fault.release.wait(120)
                if fault.kind == "hang":
                    return self.drop(request)
            elif fault.kind == "lost":  # does the work, but the answer does not arrive
                self.route(request, body)
                return self.drop(request)
            elif isinstance(fault.kind, int):
                return self.answer(request, fault.kind, fault.body, fault.headers)
        status, content, headers = self.route(request, body)
        return self.answer(request, status, content, headers)

    def read_body(self, request):
        if "chunked" in request.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(request.rfile.readline(), 16):
                parts.append(request.rfile.read(size))
                request.rfile.readline()
            request.rfile.readline()
            return b"".join(parts)
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))

    def drop(self, request):
        request.close_connection = True
        with contextlib.suppress(OSError):
            request.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, request, status, content, headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(OSError):
            request.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                request.send_header(name, value)
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(content)

    def route(self, request, body):
        with self.lock:
            return self.route_locked(request, body)

    def route_locked(self, request, body):
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        user, role = self.TOKENS.get(token, (None, None))
        lfs = re.fullmatch(r"/lfs/(\w+)/(\d+)", path)
        if lfs:
            if hashlib.sha256(body).hexdigest() != lfs[1] or len(body) != int(lfs[2]):
                return 400, {"error": "hash or size is not what was announced"}, {}
            self.objects[lfs[1]] = body
            return 200, b"", {"ETag": '"x"'}
        if token and user is None:
            return 401, {"error": f"Invalid credentials: {token}"}, {"X-Error-Message": f"Invalid token {token}"}
        if path == "/api/whoami-v2":
            return (200, {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}, {}) if user else (401, {}, {})
        if path == "/api/validate-yaml":
            bad = "REFUSE" in json.loads(body)["content"]
            return (400, {"errors": [{"message": "bad card"}], "warnings": []}, {}) if bad else (200, {"errors": [], "warnings": []}, {})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = asked["name"] if "/" in asked["name"] else f"{asked.get('organization') or user}/{asked['name']}"
            answer = {"url": f"{self.url}/{repo_id}", "id": repo_id, "name": repo_id}
            if user is None:
                return 401, {"error": "no token"}, {}
            if repo_id in self.repos:
                return 409, {"error": "You already created this model repo", **answer}, {}
            if role != "write" or repo_id.split("/")[0] != user:
                return 403, {"error": "you don't have the rights"}, {}
            self.commit(repo_id, "initial commit", {".gitattributes": b"*.h5 filter=lfs\n"})
            return 200, answer, {}
        found = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?$", path)
        repo_id, rest = (found[1], found[2] or "") if found else ("", "")
        if repo_id not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        history = self.repos[repo_id]
        write = role == "write" and repo_id.split("/")[0] == user
        if rest == "info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self.objects:
                    item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}/{item['size']}"}}
            return (200, {"transfer": "basic", "objects": objects}, {}) if write else (403, {}, {})
        if rest.startswith("preupload/"):
            if not write:
                return 403, {"error": f"no right to write with {token}"}, {}
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "lfs" if self.is_lfs(f["path"]) else "regular",
                                    "shouldIgnore": False, "oid": self.oid(history[-1]["files"].get(f["path"]), f["path"])} for f in files]}, {}
        if rest.startswith("commit/"):
            return self.route_commit(repo_id, history, write, [json.loads(line) for line in body.splitlines()])
        if rest.startswith(("revision/", "tree/")) or not rest:
            part = rest.split("/")
            commit = self.at(history, part[1] if rest else "main")
            siblings = [{"rfilename": name} for name in commit["files"]]
            if part[0] == "tree":
                return 200, [{"type": "file", "path": n, "size": len(c), "oid": self.oid(c, n)} for n, c in commit["files"].items()], {}
            return 200, {"id": repo_id, "modelId": repo_id, "sha": commit["oid"], "siblings": siblings, "private": False,
                         "disabled": False, "downloads": 0, "likes": 0, "tags": [], "gated": False}, {}
        if rest.startswith("resolve/"):
            _, revision, name = rest.split("/", 2)
            commit = self.at(history, revision)
            if name not in commit["files"]:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit["oid"]}
            content = commit["files"][name]
            return 200, content, {"X-Repo-Commit": commit["oid"], "ETag": f'"{self.oid(content, name)}"'}
        return 404, {"error": "no such thing"}, {}

    def route_commit(self, repo_id, history, write, lines):
        if not write:
            return 403, {"error": "no right to write"}, {}
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, history[-1]["oid"]):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        changes = {l["value"]["path"]: base64.b64decode(l["value"]["content"]) for l in lines if l["key"] == "file"}
        for line in lines:
            if line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.objects:
                    return 400, {"error": "LFS object is missing"}, {}
                changes[line["value"]["path"]] = self.objects[line["value"]["oid"]]
        deletions = [line["value"]["path"] for line in lines if line["key"] in ("deletedFile", "deletedEntry")]
        if not set(deletions) <= history[-1]["files"].keys():
            return 404, {"error": "cannot delete what is not there"}, {"X-Error-Code": "EntryNotFound"}
        oid = self.commit(repo_id, header["summary"], changes, deletions)
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid, "hookOutput": "", "success": True}, {}

    @staticmethod
    def is_lfs(name):
        return name.endswith((".h5", ".keras", ".npz"))

    def oid(self, content, name):
        """The identity that the Hub tells of a file: git's for regular ones, the content's SHA-256 for LFS."""
        if content is None:
            return None
        if self.is_lfs(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @staticmethod
    def at(history, revision):
        return next((c for c in history if c["oid"] == revision), history[-1])


# The client reads its settings when it is imported, so the stand-in starts first.
HUB_URL = os.environ.get("STAND_IN_HUB")  # a child process of a test uses its parent's
hub = None if HUB_URL else Hub()
HOME = tempfile.TemporaryDirectory()
os.environ.update(
    HF_ENDPOINT=HUB_URL or hub.url,
    HF_HOME=HOME.name,
    HF_HUB_DISABLE_XET="1",  # the stand-in speaks the LFS protocol only
    HF_HUB_DISABLE_TELEMETRY="1",
    TF_CPP_MIN_LOG_LEVEL="3",
)
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.pop(variable, None)

import huggingface_hub
import numpy as np
import pytest
import tensorflow as tf

import keras_callbacks as kc
from keras_callbacks import KerasMetricCallback, PushToHubCallback, load_repo_checkpoint


def has(*libraries):
    """Whether all these libraries are installed; `__test__ = has(...)` decides if a class is collected."""
    return all(importlib.util.find_spec(library) for library in libraries)


def lineages():
    """The Keras packages of this environment: Keras 3, tf_keras, or what TensorFlow 2.15 calls tf.keras."""
    import keras

    found = [keras] if keras.__version__.startswith("3") else [tf.keras]
    if has("tf_keras"):
        found.append(importlib.import_module("tf_keras"))
    return found


BACKEND = importlib.import_module("keras").backend.backend()
KERAS3 = [package for package in lineages() if hasattr(package, "ops")]
WRITE = "hf_write"  # a token of the stand-in that may write to the repositories of "user"


@pytest.fixture(params=lineages(), ids=lambda package: "keras3" if package in KERAS3 else "keras2")
def keras(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_hub():
    hub.reset()
    yield
    hub.reset()


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
    """Shortens the waits between tries; a test that is about them sets its own."""
    monkeypatch.setattr(kc, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(kc, "BACKGROUND_SECONDS", 2.0)
    monkeypatch.setattr(kc, "FINAL_SECONDS", 4.0)
    monkeypatch.setattr(kc, "REQUEST_SECONDS", 20.0)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 4)).astype("float32")  # 22 examples: the last batch of 8 is smaller
Y = RNG.integers(0, 3, 22)


def small_model(keras, optimizer="adam", **compile_args):
    """A classifier from 4 numbers to 3 classes, always with the same weights at first."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], **compile_args)
    return model


def by_numpy(model, x=X):
    """The predictions of small_model, written out."""
    kernel, bias = model.get_weights()
    logits = x @ kernel + bias
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def evaluate(model, dataset, metric_fn=None, logs=None, **options):
    """Runs one epoch's end of KerasMetricCallback outside fit; returns what metric_fn received."""
    received = []

    def record(predictions, labels):
        received.append(EvalPair(predictions, labels))
        return {"n": 1.0}

    callback = KerasMetricCallback(metric_fn or record, dataset, **options)
    callback.set_model(model)
    callback.set_params({"verbose": 0})
    callback.on_train_begin()
    callback.on_epoch_end(0, {} if logs is None else logs)
    return received[-1] if received else None


EvalPair = collections.namedtuple("EvalPair", "predictions labels")


def pushing(folder, name="model", **options):
    return PushToHubCallback(folder / name, hub_token=WRITE, **options)


def on_hub(name="model", index=-1):
    """The files of a repository of "user" in its commit number `index`, by name."""
    return hub.files(f"user/{name}", index)


def download(folder, name="model", index=-1):
    """Writes the files of a commit into a folder, as a user would download them, and returns it."""
    for path, content in on_hub(name, index).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def load(keras, folder):
    """Loads a plain Keras model with its library's own call."""
    if keras in KERAS3:
        return keras.saving.load_model(folder)
    return keras.models.load_model(folder / "model.keras")


def no_model_leftovers(folder):
    return not list(folder.glob(".keras_callbacks-*"))


class TestPush:
    def test_the_model_on_the_hub_loads_and_predicts_the_same(self, keras, tmp_path):
        model = small_model(keras)
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[pushing(tmp_path)])
        loaded = load(keras, download(tmp_path / "downloaded"))
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
        assert hub.commits("user/model")[-1] == "End of training"
