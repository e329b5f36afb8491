"""Tests of keras_callbacks: real models, real `fit`, and the real huggingface_hub client.

The Hub is a stand-in: an HTTP server on loopback, below, which keeps repositories in memory, checks what
it is sent as the real one does, and fails on demand. Classes that need a library which an environment
lacks are not collected there.
"""

import base64
import collections
import concurrent.futures
import configparser
import contextlib
import copy
import csv
import email.utils
import functools
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import urllib.parse

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
            disable_nagle_algorithm = True  # else each answer takes 40 ms

            def handle_any(self):
                hub.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *args):
                pass

        self.lock = threading.RLock()
        self.count = 0
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
            self.count += 1  # no oid ever comes again: the client keeps what it has read by oid
            oid = hashlib.sha1(f"{repo_id} {self.count}".encode()).hexdigest()
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
            return (
                (200, {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}, {})
                if user
                else (401, {}, {})
            )
        if path == "/api/validate-yaml":
            bad = "REFUSE" in json.loads(body)["content"]
            return (
                (400, {"errors": [{"message": "bad card"}], "warnings": []}, {})
                if bad
                else (200, {"errors": [], "warnings": []}, {})
            )
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
            return (
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if self.is_lfs(f["path"]) else "regular",
                            "shouldIgnore": False,
                            "oid": self.oid(history[-1]["files"].get(f["path"]), f["path"]),
                        }
                        for f in files
                    ]
                },
                {},
            )
        if rest.startswith("commit/"):
            return self.route_commit(repo_id, history, write, [json.loads(line) for line in body.splitlines()])
        if rest.startswith(("revision/", "tree/")) or not rest:
            part = rest.split("/")
            commit = self.at(history, part[1] if rest else "main")
            siblings = [{"rfilename": name} for name in commit["files"]]
            if part[0] == "tree":
                return (
                    200,
                    [
                        {"type": "file", "path": n, "size": len(c), "oid": self.oid(c, n)}
                        for n, c in commit["files"].items()
                    ],
                    {},
                )
            return (
                200,
                {
                    "id": repo_id,
                    "modelId": repo_id,
                    "sha": commit["oid"],
                    "siblings": siblings,
                    "private": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "gated": False,
                },
                {},
            )
        if rest.startswith("resolve/"):
            _, revision, name = rest.split("/", 2)
            commit = self.at(history, revision)
            if name not in commit["files"]:
                return (
                    404,
                    {"error": "Entry not found"},
                    {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit["oid"]},
                )
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
        return (
            200,
            {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid, "hookOutput": "", "success": True},
            {},
        )

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


def fit_in_order(model, **options):
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, **options)


def state_of(model):
    """The values of the weights and of the optimizer's variables."""
    variables = model.optimizer.variables
    return [*model.get_weights(), *(v.numpy() for v in (variables() if callable(variables) else variables))]


def children(*codes):
    """Runs pairs of code and environment variables in new processes at once, which share this module and its Hub."""
    common = {**os.environ, "STAND_IN_HUB": hub.url, "PYTHONPATH": str(HERE)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code], env={**common, **own}, **options) for code, own in codes]
    try:
        for child in started:
            output, _ = child.communicate(timeout=180)
            assert child.returncode == 0, output
    finally:
        for child in started:
            child.kill()


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


class TestMetricFn:
    """What metric_fn may be, what it receives and what it may return."""

    DATA = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)

    def test_two_arguments_get_predictions_and_labels(self, keras):
        model = small_model(keras)
        received = evaluate(model, self.DATA)
        np.testing.assert_allclose(received.predictions, by_numpy(model), rtol=1e-5)
        np.testing.assert_array_equal(received.labels, Y)
        assert received.predictions.dtype == np.float32
        assert received.labels.dtype == Y.dtype

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda see: lambda pair: see(pair),
            lambda see: lambda pair, tokenizer=None: see(pair),
            lambda see: functools.partial(lambda pair, labels: see(pair), labels="bound"),
        ],
        ids=["one", "one and a default", "partial"],
    )
    def test_one_required_argument_gets_a_named_pair(self, wrap):
        def see(pair):
            predictions, labels = pair
            assert predictions is pair.predictions
            np.testing.assert_array_equal(labels, Y)
            return {"examples": len(pair.label_ids)}

        logs = {}
        evaluate(small_model(lineages()[0]), self.DATA, metric_fn=wrap(see), logs=logs)
        assert logs == {"examples": 22}

    @pytest.mark.parametrize(
        "metric_fn",
        [lambda p, labels=None: {"n": len(labels)}, lambda p, l, k=1: {"n": len(l)}, lambda *both: {"n": len(both[1])}],
        ids=["labels has a default", "a third has a default", "variadic"],
    )
    def test_these_get_two_arguments(self, metric_fn):
        logs = {}
        evaluate(small_model(lineages()[0]), self.DATA, metric_fn=metric_fn, logs=logs)
        assert logs == {"n": 22}

    @pytest.mark.parametrize(
        "metric_fn", [None, {"accuracy": 1}, lambda: {}, lambda a, b, c: {}, lambda *, predictions, labels: {}]
    )
    def test_what_cannot_be_called_is_refused_at_construction(self, metric_fn):
        with pytest.raises(TypeError, match="metric_fn must .* but received"):
            KerasMetricCallback(metric_fn, self.DATA)

    @pytest.mark.parametrize("result", [None, 0.5, [("f1", 0.5)]])
    def test_anything_but_a_dict_is_refused_and_shown(self, result):
        with pytest.raises(TypeError, match="must return a dict.*" + re.escape(repr(result))):
            evaluate(small_model(lineages()[0]), self.DATA, metric_fn=lambda p, l: result)

    @pytest.mark.parametrize("value", ["0.5", None, [1.0], np.ones(2), np.ones(1), 1j, {"f1": 1.0}])
    def test_a_value_that_is_no_number_is_refused_by_its_key(self, value):
        with pytest.raises(TypeError, match="'f1'"):
            evaluate(small_model(lineages()[0]), self.DATA, metric_fn=lambda p, l: {"f1": value})

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (np.float32(0.5), 0.5),
            (np.array(3), 3),
            (tf.constant(0.25), 0.25),
            (np.bool_(True), True),
            (tf.constant(0.5, tf.bfloat16), 0.5),
            (7, 7),
            (float("inf"), float("inf")),
        ],
    )
    def test_values_become_plain_numbers(self, value, expected):
        logs = {}
        evaluate(small_model(lineages()[0]), self.DATA, metric_fn=lambda p, l: {"score": value}, logs=logs)
        assert logs == {"score": expected}
        assert type(logs["score"]) is type(expected)

    def test_the_arrays_are_fresh_and_writable_at_every_call(self):
        seen = []

        def spoil(predictions, labels):
            seen.append(labels.copy())
            labels[:] = -100
            predictions[:] = 0
            return {}

        callback = KerasMetricCallback(spoil, (X, Y), batch_size=32)
        callback.set_model(small_model(lineages()[0]))
        callback.on_epoch_end(0)
        callback.on_epoch_end(1)
        np.testing.assert_array_equal(seen, [Y, Y])


class TestLogs:
    def test_callbacks_listed_after_it_and_history_see_the_metrics(self, keras, tmp_path, monkeypatch):
        falling = iter([0.9, 0.8, 0.7, 0.6])
        callbacks = [
            KerasMetricCallback(lambda p, l: {"f1": next(falling)}, (X, Y), batch_size=8),
            keras.callbacks.EarlyStopping("f1", mode="max", patience=2),
            keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
            keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}-{f1:.1f}.weights.h5"), save_weights_only=True),
            pushing(tmp_path),
        ]
        model = small_model(keras)
        history = model.fit(X, Y, epochs=9, verbose=0, callbacks=callbacks)
        assert history.history["f1"] == [0.9, 0.8, 0.7]
        with open(tmp_path / "log.csv") as file:
            assert [row["f1"] for row in csv.DictReader(file)] == ["0.9", "0.8", "0.7"]
        assert (tmp_path / "1-0.9.weights.h5").exists()
        assert [row["f1"] for row in callbacks[-1].training_history] == [0.9, 0.8, 0.7]

    def test_the_progress_bar_shows_the_metric(self, keras, capsys):
        callback = KerasMetricCallback(lambda p, l: {"rouge": 0.4321}, (X, Y), batch_size=8)
        small_model(keras).fit(X, Y, epochs=1, verbose=2, callbacks=[callback])
        assert "rouge: 0.4321" in capsys.readouterr().out

    def test_a_name_that_keras_logged_is_replaced_and_warned_of_once(self, keras, caplog):
        callback = KerasMetricCallback(lambda p, l: {"accuracy": 2.0}, (X, Y), batch_size=8)
        history = small_model(keras).fit(X, Y, epochs=3, verbose=0, callbacks=[callback])
        assert history.history["accuracy"] == [2.0, 2.0, 2.0]
        assert [r.getMessage() for r in caplog.records if r.name == "keras_callbacks"] == [
            "metric_fn replaces ['accuracy'] in the logs of this epoch."
        ]

    def test_two_of_them_in_one_fit(self, keras):
        callbacks = [
            KerasMetricCallback(lambda p, l: {"first": len(p)}, (X, Y), batch_size=8),
            KerasMetricCallback(lambda p, l: {"second": len(p)}, X[:5], batch_size=8),
        ]
        history = small_model(keras).fit(X, Y, verbose=0, callbacks=callbacks)
        assert (history.history["first"], history.history["second"]) == ([22], [5])

    @pytest.mark.parametrize(("verbose", "drawn"), [(1, True), ("auto", True), (0, False), (2, False)])
    def test_a_long_evaluation_draws_a_bar_on_a_terminal_and_wipes_it(self, monkeypatch, verbose, drawn):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        plain_tqdm = kc.tqdm
        delays = []

        def without_delay(*args, delay, **options):
            delays.append(delay)
            return plain_tqdm(*args, delay=0, mininterval=0, **options)

        monkeypatch.setattr(kc, "tqdm", without_delay)
        callback = KerasMetricCallback(lambda p, l: {}, (X, Y), batch_size=1)
        small_model(lineages()[0]).fit(X, Y, verbose=verbose, callbacks=[callback])
        assert ("Evaluating" in terminal.getvalue()) is drawn
        assert not "".join(terminal.getvalue().split("\r")[-2:]).strip()
        assert delays == [2]

    def test_nothing_is_drawn_off_a_terminal(self, keras, capfd):
        small_model(keras).fit(X, Y, verbose=1, callbacks=[KerasMetricCallback(lambda p, l: {}, (X, Y), batch_size=1)])
        assert "Evaluating" not in capfd.readouterr().err


class TestEvalDataset:
    @pytest.mark.parametrize(
        "data",
        [(X, Y), (X, Y, np.ones(22)), (tf.constant(X), tf.constant(Y))],
        ids=["tuple", "with sample_weight", "tensors"],
    )
    def test_plain_data_is_batched(self, keras, data):
        model = small_model(keras)
        received = evaluate(model, data, batch_size=5)
        np.testing.assert_allclose(received.predictions, by_numpy(model), rtol=1e-5)
        np.testing.assert_array_equal(received.labels, Y)

    @pytest.mark.parametrize("data", [X, tf.constant(X), (X,), (X, None)], ids=["array", "tensor", "one", "None"])
    def test_data_without_labels_give_none(self, keras, data):
        model = small_model(keras)
        received = evaluate(model, data, batch_size=8)
        np.testing.assert_allclose(received.predictions, by_numpy(model), rtol=1e-5)
        assert received.labels is None

    def test_a_data_set_is_read_once_an_epoch_whatever_its_order(self, keras):
        passes = []

        def shuffled():
            passes.append(None)
            order = np.random.default_rng(len(passes)).permutation(22)
            for rows in np.array_split(order, 3):
                yield X[rows], Y[rows]

        spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int64))
        dataset = tf.data.Dataset.from_generator(shuffled, output_signature=spec)
        model = small_model(keras)
        received = evaluate(model, dataset, batch_size=3)  # batch_size is ignored
        assert len(passes) == 1
        order = np.random.default_rng(1).permutation(22)
        np.testing.assert_array_equal(received.labels, Y[order])
        np.testing.assert_allclose(received.predictions, by_numpy(model, X[order]), rtol=1e-5)

    @pytest.mark.parametrize(
        ("data", "batch_size", "error", "match"),
        [
            ((X, Y), None, ValueError, "batch_size must be a positive integer"),
            (X, 0, ValueError, "batch_size must be .* received batch_size=0"),
            (tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).repeat(), None, ValueError, "must be finite"),
            (tf.data.Dataset.from_tensor_slices((X, Y)), None, ValueError, "must be batched"),
            (tf.data.Dataset.from_tensor_slices({"x": X, "labels": Y}), None, ValueError, "must be batched"),
            ((X[:0], Y[:0]), 8, ValueError, "is empty"),
            (tf.data.Dataset.from_tensor_slices((X, Y)).take(0), None, ValueError, "is empty"),
            ((X, Y[:3]), 8, ValueError, "22 and 3"),
            ([X, Y], 8, TypeError, "received list"),
            ((X, Y, Y, Y), 8, ValueError, "have 4 parts"),
        ],
    )
    def test_unusable_data_is_refused_at_construction(self, data, batch_size, error, match):
        with pytest.raises(error, match=match):
            KerasMetricCallback(lambda p, l: {}, data, batch_size=batch_size)

    def test_a_data_set_that_turns_out_empty_says_so(self, keras):
        dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).filter(lambda x, y: False)
        with pytest.raises(ValueError, match="gave none"):
            evaluate(small_model(keras), dataset)


class TestLabelColumns:
    COLUMNS = {"ids": X, "labels": Y, "start_positions": Y + 10, "end_positions": Y + 20}

    @staticmethod
    def labels_of(data, **options):
        """The labels that a model which ignores its inputs is evaluated with."""

        class Constant(tf.keras.Model):
            def call(self, inputs):
                return tf.zeros((tf.shape(tf.nest.flatten(inputs)[0])[0], 2))

        return evaluate(Constant(), data, batch_size=8, **options).labels

    def test_the_column_labels_comes_first_and_the_guess_is_logged(self, caplog):
        np.testing.assert_array_equal(self.labels_of(self.COLUMNS), Y)
        assert [(r.name, r.levelname) for r in caplog.records] == [("keras_callbacks", "WARNING")]
        assert "taking labels of eval_dataset" in caplog.text

    def test_then_start_and_end_positions(self):
        labels = self.labels_of({k: v for k, v in self.COLUMNS.items() if k != "labels"})
        np.testing.assert_array_equal(labels["start_positions"], Y + 10)
        np.testing.assert_array_equal(labels["end_positions"], Y + 20)
        assert list(labels) == ["start_positions", "end_positions"]

    def test_the_labels_of_a_tuple_win_and_nothing_is_guessed(self, caplog):
        np.testing.assert_array_equal(self.labels_of((self.COLUMNS, Y + 1)), Y + 1)
        assert not caplog.records

    @pytest.mark.parametrize("wanted", ["end_positions", ["end_positions"]])
    def test_one_wanted_column_is_bare(self, wanted):
        np.testing.assert_array_equal(self.labels_of(self.COLUMNS, label_cols=wanted), Y + 20)

    def test_wanted_columns_may_be_of_labels_that_are_a_dict(self):
        labels = self.labels_of((X, {"a": Y, "b": Y + 1, "c": Y + 2}), label_cols=["c", "a"])
        assert list(labels) == ["c", "a"]
        np.testing.assert_array_equal(labels["c"], Y + 2)

    def test_labels_that_are_a_dict_of_one_column_are_bare(self):
        np.testing.assert_array_equal(self.labels_of((X, {"a": Y})), Y)

    @pytest.mark.parametrize(
        ("data", "wanted", "match"),
        [
            ({"ids": X, "label": Y}, None, r"set label_cols .* \['ids', 'label'\]"),
            ({"ids": X, "labels": Y}, ["target"], r"has \['ids', 'labels'\], but received \['target'\]"),
            ((X, Y), ["labels"], "no named columns"),
        ],
    )
    def test_columns_that_cannot_be_found_are_refused_with_a_list(self, data, wanted, match):
        with pytest.raises(ValueError, match=match):
            KerasMetricCallback(lambda p, l: {}, data, batch_size=8, label_cols=wanted)

    def test_a_functional_model_gets_just_the_columns_it_has_inputs_for(self, keras):
        inputs = {name: keras.layers.Input((4,), name=name) for name in ("query", "reply")}
        model = keras.Model(inputs, keras.layers.Subtract()([inputs["query"], inputs["reply"]]))
        data = {"labels": X * 100, "query": X * 3, "reply": X}  # "labels" sorts first and has the right shape
        received = evaluate(model, data, batch_size=8)
        np.testing.assert_allclose(received.predictions, X * 3 - X, rtol=1e-6)
        np.testing.assert_array_equal(received.labels, X * 100)

    def test_inputs_reach_the_model_although_labels_are_called_like_them(self, keras):
        inputs = {"x": keras.layers.Input((4,), name="x")}
        received = evaluate(
            keras.Model(inputs, keras.layers.Rescaling(2.0)(inputs["x"])), ({"x": X}, {"x": X + 1}), batch_size=8
        )
        np.testing.assert_allclose(received.predictions, X * 2, rtol=1e-6)
        np.testing.assert_array_equal(received.labels, X + 1)

    def test_a_functional_model_with_an_input_called_labels_gets_it(self, keras):
        inputs = {name: keras.layers.Input((4,), name=name) for name in ("labels", "query")}
        model = keras.Model(inputs, keras.layers.Add()([inputs["query"], inputs["labels"]]))
        received = evaluate(model, {"labels": X, "query": X * 3}, batch_size=8)
        np.testing.assert_allclose(received.predictions, X * 4, rtol=1e-6)


class TestKindsOfModels:
    """Outputs equal those of Keras' own predict, or NumPy written out."""

    def test_several_inputs_and_outputs_in_any_nesting(self, keras):
        one, two = keras.layers.Input((4,), name="one"), keras.layers.Input((4,), name="two")
        total = keras.layers.Add()([one, two])
        received = evaluate(keras.Model([one, two], [total, one]), ((X, X * 2), Y), batch_size=8)
        np.testing.assert_allclose(received.predictions[0], X * 3, rtol=1e-6)
        np.testing.assert_allclose(received.predictions[1], X, rtol=1e-6)
        assert len(received.predictions) == 2

    def test_outputs_by_name_and_output_cols(self, keras):
        inputs = keras.layers.Input((4,))
        outputs = {name: keras.layers.Rescaling(scale)(inputs) for name, scale in [("a", 2.0), ("b", 3.0), ("c", 4.0)]}
        model = keras.Model(inputs, outputs)
        everything = evaluate(model, (X, Y), batch_size=8).predictions
        assert sorted(everything) == ["a", "b", "c"]
        np.testing.assert_allclose(everything["c"], X * 4, rtol=1e-6)
        np.testing.assert_allclose(evaluate(model, X, batch_size=8, output_cols="b").predictions, X * 3, rtol=1e-6)
        assert list(evaluate(model, X, batch_size=8, output_cols=["c", "a"]).predictions) == ["c", "a"]

    def test_an_unknown_output_is_refused_before_the_first_epoch(self, keras):
        inputs = keras.layers.Input((4,))
        model = keras.Model(inputs, {"a": keras.layers.Dense(1)(inputs)})
        model.compile(loss="mse")
        callback = KerasMetricCallback(lambda p, l: {}, (X, Y), batch_size=8, output_cols=["logits"])
        before = model.get_weights()
        with pytest.raises(ValueError, match=r"output_cols must .*\['a'\].*\['logits'\]"):
            model.fit(X, {"a": Y}, verbose=0, callbacks=[callback])
        np.testing.assert_array_equal(model.get_weights()[0], before[0])

    def test_output_cols_of_a_model_without_names_are_refused(self, keras):
        with pytest.raises(ValueError, match="output_cols must .* Sequential, which are not named, but received"):
            evaluate(small_model(keras), (X, Y), batch_size=8, output_cols=["logits"])

    @pytest.mark.parametrize(
        "compile_args", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}]
    )
    def test_compile_options_change_nothing(self, keras, compile_args):
        model = small_model(keras, **compile_args)
        received = []
        callback = KerasMetricCallback(lambda p, l: received.append(p) or {}, (X, Y), batch_size=8)
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=[callback])
        np.testing.assert_allclose(received[0], by_numpy(model), rtol=1e-5)

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_half_precision_arrives_as_float32(self, keras, policy):
        keras.mixed_precision.set_global_policy(policy)
        try:
            model = small_model(keras, optimizer="sgd")
        finally:
            keras.mixed_precision.set_global_policy("float32")
        received = evaluate(model, (X, Y), batch_size=8).predictions
        expected = model.predict(X, verbose=0)
        assert expected.dtype == policy.removeprefix("mixed_")
        assert received.dtype == np.float32
        np.testing.assert_array_equal(received, expected.astype("f4"))

    def test_a_custom_predict_step_is_honoured(self, keras):
        class Doubling(keras.Model):
            def call(self, inputs):
                return inputs

            def predict_step(self, data):
                return data[0] * 2

        np.testing.assert_array_equal(evaluate(Doubling(), (X, Y), batch_size=8).predictions, X * 2)

    def test_a_model_that_is_unbuilt_until_its_first_batch(self, keras):
        model = keras.Sequential([keras.layers.Dense(3)])
        model.compile("sgd", "mse")
        received = []
        callback = KerasMetricCallback(lambda p, l: received.append(p) or {}, (X, Y), batch_size=8)
        model.fit(X, X[:, :3], verbose=0, callbacks=[callback])
        kernel, bias = model.get_weights()
        np.testing.assert_allclose(received[0], X @ kernel + bias, rtol=1e-5, atol=1e-6)

    def test_the_weights_are_those_of_now_and_another_model_is_another_model(self, keras):
        callback = KerasMetricCallback(lambda p, l: received.append(p) or {}, (X, Y), batch_size=8)
        received, model, other = [], small_model(keras), small_model(keras)
        other.set_weights([w + 1 for w in other.get_weights()])
        for each in (model, model, other):
            callback.set_model(each)
            callback.on_epoch_end(0, {})
            np.testing.assert_allclose(received[-1], by_numpy(each), rtol=1e-5)
            each.set_weights([w * 2 for w in each.get_weights()])

    def test_a_model_that_was_changed_between_two_fits_is_measured_as_it_is(self, keras):
        class Scaling(keras.Model):
            factor = 2.0

            def call(self, inputs):
                return inputs * self.factor

        model, received = Scaling(), []
        callback = KerasMetricCallback(lambda p, l: received.append(p) or {}, (X, Y), batch_size=8)
        callback.set_model(model)
        for model.factor in (2.0, 3.0):
            callback.on_train_begin()
            callback.on_epoch_end(0, {})
        np.testing.assert_allclose(received, [X * 2, X * 3], rtol=1e-6)

    def test_sparse_labels_arrive_dense(self, keras):
        labels = tf.sparse.from_dense(np.eye(22, 5, dtype="f4"))
        dataset = tf.data.Dataset.from_tensor_slices((X, labels)).batch(8)
        np.testing.assert_array_equal(evaluate(small_model(keras), dataset).labels, np.eye(22, 5))

    def test_ragged_inputs_and_outputs(self):
        keras = next((package for package in lineages() if package not in KERAS3), None)
        if keras is None:
            keras = lineages()[0]

        class Same(keras.Model):
            def call(self, inputs):
                return inputs

            def predict_step(self, data):
                return data[0]

        rows = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]
        dataset = tf.data.Dataset.from_tensor_slices((tf.ragged.constant(rows, tf.uint8),) * 2).batch(2)
        received = evaluate(Same(), dataset)
        expected = np.full((5, 4), -100)
        for index, row in enumerate(rows):
            expected[index, : len(row)] = row
        for arrays in received:
            np.testing.assert_array_equal(arrays, expected)
            assert arrays.dtype == np.int16

    def test_use_outside_fit_through_a_callback_list(self, keras):
        callback = KerasMetricCallback(lambda p, l: {"n": len(p)}, (X, Y), batch_size=8)
        history = keras.callbacks.History()
        callbacks = keras.callbacks.CallbackList([callback, history], model=small_model(keras))
        callbacks.on_train_begin()
        callbacks.on_epoch_end(0, {})
        assert history.history["n"] == [22]

    def test_a_deep_copy_works_like_the_original(self, keras, tmp_path):
        model = small_model(keras)
        metric = copy.deepcopy(KerasMetricCallback(lambda p, l: {"n": len(p)}, (X, Y), batch_size=8))
        push = copy.deepcopy(pushing(tmp_path))
        assert model.fit(X, Y, verbose=0, callbacks=[metric, push]).history["n"] == [22]
        np.testing.assert_array_equal(
            load(keras, download(tmp_path / "d")).predict(X, verbose=0), model.predict(X, verbose=0)
        )


class TestJoinBatches:
    """Against NumPy written out: one array filled by hand."""

    @staticmethod
    def by_hand(batches, padding):
        longest = np.max([b.shape[1:] for b in batches], axis=0)
        expected = np.full((sum(map(len, batches)), *longest), padding, dtype=object)
        row = 0
        for batch in batches:
            expected[(slice(row, row + len(batch)), *(slice(n) for n in batch.shape[1:]))] = batch
            row += len(batch)
        return expected

    @pytest.mark.parametrize(
        ("shapes", "dtype", "joined_dtype"),
        [
            ([(4, 3), (4, 3), (1, 3)], "float32", "float32"),
            ([(2, 3), (2, 5), (1, 4)], "int64", "int64"),
            ([(2, 3, 7), (3, 5, 2)], "float16", "float32"),
            ([(2, 3), (2, 3)], "uint8", "uint8"),
            ([(2, 3), (2, 4)], "uint8", "int16"),
            ([(2, 3), (2, 4)], "bool", "int8"),
            ([(2, 3), (2, 4)], "uint32", "int64"),
            ([(2, 0), (2, 2)], "float64", "float64"),
            ([(5,), (1,)], "int32", "int32"),
        ],
    )
    def test_every_axis_is_padded_and_the_dtype_widened_only_where_needed(self, shapes, dtype, joined_dtype):
        batches = [RNG.integers(0, 2, shape).astype(dtype) for shape in shapes]
        expected = self.by_hand(batches, -100)
        joined = kc._join_batches(list(batches), -100)
        np.testing.assert_array_equal(joined, expected.astype(joined_dtype))
        assert joined.dtype == joined_dtype

    def test_text_is_padded_with_the_empty_string(self):
        words = [np.array([["a", "b"]], object), np.array([["c"]], object)]
        assert kc._join_batches(words, -100).tolist() == [["a", "b"], ["c", ""]]
        assert kc._join_batches([np.array([["a", "b"]]), np.array([["cde"]])], -100).tolist() == [
            ["a", "b"],
            ["cde", ""],
        ]

    def test_bfloat16_is_padded_in_float32(self):
        dtype = tf.bfloat16.as_numpy_dtype
        joined = kc._join_batches([np.ones((1, 2), dtype), np.ones((1, 1), dtype)], -100)
        assert joined.dtype == np.float32
        assert joined.tolist() == [[1, 1], [1, -100]]

    def test_nesting_is_kept_and_missing_parts_are_padding(self):
        batches = [
            {"a": np.ones((2, 1)), "b": (np.ones((2, 2)), (np.zeros((2, 1)),))},
            {"a": np.ones((1, 1)), "b": (np.ones((1, 1)), (np.zeros((1, 1)), np.zeros((1, 1))))},
        ]
        joined = kc._join_batches(batches, -100)
        assert joined["a"].tolist() == [[1], [1], [1]]
        assert type(joined["b"]) is tuple
        assert joined["b"][0].tolist() == [[1, 1], [1, 1], [1, -100]]
        assert [part.tolist() for part in joined["b"][1]] == [[[0], [0], [0]], [[-100], [-100], [0]]]

    def test_a_scalar_of_each_batch_becomes_one_value_of_each_batch(self, keras):
        class Mean(keras.Model):
            def call(self, inputs):
                return inputs

            def predict_step(self, data):
                return tf.reduce_mean(data[0])

        received = evaluate(Mean(), X, batch_size=8).predictions
        np.testing.assert_allclose(received, [X[:8].mean(), X[8:16].mean(), X[16:].mean()], rtol=1e-5)

    def test_ranks_that_differ_are_refused(self):
        with pytest.raises(ValueError, match=r"same number of axes.*\[1, 2\]"):
            kc._join_batches([np.ones(2), np.ones((2, 2))], -100)


class TestGenerateOfOwn:
    """A model of no library with a generate of its own: it takes the batch as it is."""

    @staticmethod
    def model(keras):
        class Speaker(keras.Model):
            def call(self, inputs):
                return inputs

            def generate(self, inputs, repeat=1):
                words = [word.decode() for word in inputs.numpy()]
                return [" ".join([word] * repeat) for word in words]

        return Speaker()

    WORDS = np.array(["one", "two", "three"])

    def test_text_in_text_out_with_generate_kwargs(self, keras):
        received = evaluate(
            self.model(keras),
            ({"text": self.WORDS}["text"], self.WORDS),
            batch_size=2,
            predict_with_generate=True,
            generate_kwargs={"repeat": 2},
        )
        assert received.predictions.tolist() == ["one one", "two two", "three three"]
        assert received.labels.tolist() == ["one", "two", "three"]

    def test_text_arrives_as_str_and_other_bytes_as_they_are(self, keras):
        texts = np.array([["caf\u00e9", ""], ["x", "y"]], object)
        received = evaluate(self.model(keras), (self.WORDS[:2], texts), batch_size=1, predict_with_generate=True)
        assert received.labels.tolist() == texts.tolist()
        data = (self.WORDS[:2], np.array([b"\xff\xfe", b"ok"], object))
        assert evaluate(self.model(keras), data, batch_size=1, predict_with_generate=True).labels.tolist() == [
            b"\xff\xfe",
            "ok",
        ]

    def test_the_loss_is_kept_only_when_it_is_named(self, keras):
        inputs = keras.layers.Input((4,))
        model = keras.Model(inputs, {name: keras.layers.Rescaling(2.0)(inputs) for name in ("loss", "logits")})
        np.testing.assert_array_equal(evaluate(model, X, batch_size=8).predictions, X * 2)
        assert list(evaluate(model, X, batch_size=8, output_cols=["loss", "logits"]).predictions) == ["loss", "logits"]

    def test_xla_warns_that_it_has_no_effect_and_goes_on(self, keras, caplog):
        options = {"batch_size": 2, "predict_with_generate": True, "use_xla_generation": True}
        received = evaluate(self.model(keras), (self.WORDS, self.WORDS), **options)
        assert received.predictions.tolist() == ["one", "two", "three"]
        assert "compile(jit_compile=True)" in caplog.text

    def test_a_model_without_generate_is_refused_when_training_begins(self, keras):
        model = small_model(keras)
        callback = KerasMetricCallback(lambda p, l: {}, (X, Y), batch_size=8, predict_with_generate=True)
        before = model.get_weights()
        with pytest.raises(ValueError, match="needs a model with a method generate"):
            model.fit(X, Y, verbose=0, callbacks=[callback])
        np.testing.assert_array_equal(model.get_weights()[0], before[0])


class TestPushArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"save_strategy": "batch"}, ValueError, r"\['no', 'steps', 'epoch'\], but received 'batch'"),
            ({"save_strategy": "steps"}, ValueError, "save_steps must be a positive integer .* save_steps=None"),
            ({"save_strategy": "steps", "save_steps": 0}, ValueError, "save_steps=0"),
            ({"save_strategy": "steps", "save_steps": 2.0}, ValueError, "save_steps=2.0"),
            ({"save_strategy": "no", "checkpoint": True}, ValueError, 'checkpoint=True needs save_strategy="epoch"'),
            ({"tokenizer": "bert"}, TypeError, "save_pretrained or save_to_preset, but received str"),
            ({"licence": "mit"}, TypeError, r"'finetuned_from'.*but received \['licence'\]"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_anything_is_made(self, tmp_path, arguments, error, match):
        with pytest.raises(error, match=match):
            pushing(tmp_path, **arguments)
        assert not hub.repos
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("strategy", ["NO", "Epoch", kc.IntervalStrategy.EPOCH, types.SimpleNamespace(value="no")])
    def test_the_strategy_in_any_case_or_as_an_enum(self, tmp_path, strategy):
        expected = str(getattr(strategy, "value", strategy)).lower()
        assert pushing(tmp_path, save_strategy=strategy).save_strategy == expected

    def test_the_repository_is_named_after_the_folder_or_as_asked(self, tmp_path):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "notes.txt").write_text("mine")
        assert pushing(tmp_path, "taken").hub_model_id == "user/taken"
        assert pushing(tmp_path, "taken", hub_model_id="short").hub_model_id == "user/short"
        assert pushing(tmp_path, "taken", hub_model_id="user/full").hub_model_id == "user/full"
        assert pushing(tmp_path, "taken", hub_model_id="user/full").hub_model_id == "user/full"
        assert sorted(hub.repos) == ["user/full", "user/short", "user/taken"]

    def test_the_cached_token_is_used(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", WRITE)
        assert PushToHubCallback(tmp_path / "model").hub_model_id == "user/model"


class Awaited(tf.keras.callbacks.Callback):
    """Listed after PushToHubCallback, it waits at the end of each epoch until the upload is done."""

    def __init__(self, push):
        super().__init__()
        self.push = push

    def _implements_train_batch_hooks(self):
        return type(self).on_train_batch_end is not tf.keras.callbacks.Callback.on_train_batch_end

    def _implements_test_batch_hooks(self):
        return False

    _implements_predict_batch_hooks = _implements_test_batch_hooks

    def on_epoch_end(self, epoch, logs=None):
        if self.push.last_job is not None:
            concurrent.futures.wait([self.push.last_job])


class TestPush:
    def test_the_model_on_the_hub_loads_and_predicts_the_same(self, keras, tmp_path):
        model = small_model(keras)
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[pushing(tmp_path)])
        loaded = load(keras, download(tmp_path / "downloaded"))
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))

    def test_the_hub_address_of_keras_3_loads(self, tmp_path):
        for keras in KERAS3:
            model = small_model(keras)
            model.fit(X, Y, verbose=0, callbacks=[pushing(tmp_path)])
            loaded = keras.saving.load_model("hf://user/model")
            np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))

    def test_each_epoch_is_one_commit_and_the_end_another(self, keras, tmp_path):
        push = pushing(tmp_path)
        small_model(keras).fit(X, Y, epochs=3, verbose=0, callbacks=[push, Awaited(push)])
        messages = hub.commits("user/model")
        assert messages[:3] == [f"Training in progress, epoch {epoch}" for epoch in range(3)]
        assert messages[3:] in ([], ["End of training"])  # none where the final state was on the Hub already

    def test_the_end_of_training_is_pushed_once_more(self, keras, tmp_path):
        class Changing(Awaited):
            def on_train_end(self, logs=None):
                self.model.set_weights([w + 1 for w in self.model.get_weights()])

        push = pushing(tmp_path)
        model = small_model(keras)
        model.fit(X, Y, verbose=0, callbacks=[Changing(push), push])
        assert hub.commits("user/model") == ["Training in progress, epoch 0", "End of training"]
        np.testing.assert_array_equal(
            load(keras, download(tmp_path / "d")).predict(X, verbose=0), model.predict(X, verbose=0)
        )

    def test_no_strategy_saves_at_the_end_only(self, keras, tmp_path):
        small_model(keras).fit(X, Y, epochs=3, verbose=0, callbacks=[pushing(tmp_path, save_strategy="no")])
        assert hub.commits("user/model") == ["End of training"]

    @pytest.mark.parametrize("steps_per_execution", [1] if BACKEND == "torch" else [1, 2])  # PyTorch knows but 1
    def test_steps_are_counted_through_epochs_and_executions(self, keras, tmp_path, steps_per_execution):
        push = pushing(tmp_path, save_strategy="steps", save_steps=5)  # an epoch has three batches

        class AwaitedBatch(Awaited):
            def on_train_batch_end(self, batch, logs=None):
                self.on_epoch_end(0)

        model = small_model(keras, steps_per_execution=steps_per_execution)
        model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=[push, AwaitedBatch(push)])
        expected = {1: [5, 10], 2: [5, 11]}[steps_per_execution]  # after batches 2, 3, 5, 6, 8, 9, 11, 12
        messages = hub.commits("user/model")
        assert messages[:2] == [f"Training in progress, step {step}" for step in expected]
        assert messages[2:] == ["End of training"]

    def test_other_files_in_the_folder_are_pushed_with_the_model(self, keras, tmp_path):
        push = pushing(tmp_path)
        events = tmp_path / "model" / "logs" / "train" / "events"

        def log(epoch, logs):
            events.parent.mkdir(parents=True, exist_ok=True)
            with events.open("a") as file:
                file.write(f"{epoch}\n")

        small_model(keras).fit(
            X, Y, epochs=2, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=log), push]
        )
        assert on_hub()["logs/train/events"] == b"0\n1\n"

    def test_the_user_reads_where_the_final_state_goes(self, keras, tmp_path, capfd):
        small_model(keras).fit(X, Y, verbose=2, callbacks=[pushing(tmp_path, save_strategy="no")])
        out, err = capfd.readouterr()
        before, _, after = out.partition(f"{hub.url}/user/model\n")
        assert f"{hub.url}/user/model/commit/" in after
        assert "loss" in before
        assert "100%" in err  # huggingface_hub's own progress bar

    def test_silence_with_verbose_0_and_no_bars_of_background_uploads(self, keras, tmp_path, capfd):
        push = pushing(tmp_path)
        small_model(keras).fit(X, Y, epochs=3, verbose=0, callbacks=[push, Awaited(push)])
        out, err = capfd.readouterr()
        assert (out, "100%" in err) == ("", False)
        assert not huggingface_hub.utils.are_progress_bars_disabled()

    def test_attributes_of_code_written_for_transformers(self, keras, tmp_path):
        push = pushing(tmp_path)
        assert (push.output_dir, push.hub_model_id, push.last_job) == (tmp_path / "model", "user/model", None)
        history = small_model(keras).fit(X, Y, epochs=2, verbose=0, callbacks=[push])
        assert [row["loss"] for row in push.training_history] == pytest.approx(history.history["loss"])
        assert push.last_job.result().oid == hub.repos["user/model"][-1]["oid"]

    def test_the_best_model_is_pushed_when_early_stopping_restores_it(self, keras, tmp_path):
        scores = iter([0.5, 0.9, 0.1, 0.2])
        weights = []
        callbacks = [
            KerasMetricCallback(lambda p, l: {"f1": next(scores)}, (X, Y), batch_size=8),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(model.get_weights())),
            keras.callbacks.EarlyStopping("f1", mode="max", patience=2, restore_best_weights=True),
            pushing(tmp_path),
        ]
        model = small_model(keras)
        model.fit(X, Y, epochs=9, verbose=0, callbacks=callbacks)
        loaded = load(keras, download(tmp_path / "d"))
        np.testing.assert_array_equal(loaded.get_weights()[0], weights[1][0])

    def test_output_dir_is_whole_and_without_leftovers(self, keras, tmp_path):
        model = small_model(keras)
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[pushing(tmp_path, checkpoint=True)])
        folder = tmp_path / "model"
        np.testing.assert_array_equal(load(keras, folder).get_weights()[0], model.get_weights()[0])
        local = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert local == {name: content for name, content in on_hub().items() if name != ".gitattributes"}

    KINDS = ["dict inputs", "several outputs"]
    if BACKEND == "tensorflow":  # a train_step is written differently for each backend
        KINDS.append("subclassed with a train_step of its own")

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds_of_models_load_back(self, keras, tmp_path, kind):
        one, two = keras.layers.Input((4,), name="one"), keras.layers.Input((4,), name="two")
        total = keras.layers.Add()([one, two])

        @keras.saving.register_keras_serializable("tests")
        class Own(keras.Model):
            def __init__(self, **config):
                super().__init__(**config)
                self.dense = keras.layers.Dense(2)

            def build(self, shape):
                self.dense.build(shape)
                super().build(shape)

            def call(self, inputs):
                return self.dense(inputs)

            def train_step(self, data):
                self(data[0])
                self.dense.bias.assign_add(tf.ones(2))
                return {"loss": tf.constant(0.5)}

        model, x = {
            "dict inputs": lambda: (
                keras.Model({"one": one, "two": two}, keras.layers.Dense(2)(total)),
                {"one": X, "two": X},
            ),
            "several outputs": lambda: (keras.Model(one, [keras.layers.Dense(2)(one), keras.layers.Dense(2)(one)]), X),
            "subclassed with a train_step of its own": lambda: (Own(), X),
        }[kind]()
        y = [X[:, :2], X[:, :2]] if kind == "several outputs" else X[:, :2]
        model.compile("sgd", ["mse", "mse"] if kind == "several outputs" else "mse")
        model.fit(x, y, verbose=0, callbacks=[pushing(tmp_path, save_strategy="no")])
        loaded = load(keras, download(tmp_path / "d"))
        expected = model.predict(x, verbose=0)
        for left, right in zip(tf.nest.flatten(loaded.predict(x, verbose=0)), tf.nest.flatten(expected), strict=True):
            np.testing.assert_array_equal(left, right)

    def test_a_model_without_an_optimizer_or_metrics(self, keras, tmp_path):
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
        push = pushing(tmp_path, checkpoint=True)
        push.set_model(model)
        push.on_train_begin()
        push.on_epoch_end(0, {"score": 1.0})
        push.on_train_end()
        np.testing.assert_array_equal(load(keras, download(tmp_path / "d")).get_weights()[0], model.get_weights()[0])


class TestFoundInReview:
    def test_files_of_the_model_itself_are_saved_whatever_their_names(self, tmp_path):
        class Folder:
            """A tokenizer that writes a file with a name which is never pushed when it is the user's."""

            def save_pretrained(self, folder):
                (pathlib.Path(folder) / "token").mkdir()
                (pathlib.Path(folder) / "token" / "vocabulary.txt").write_text("a b")

        model = small_model(lineages()[0])
        model.fit(X, Y, verbose=0, callbacks=[pushing(tmp_path, tokenizer=Folder())])
        assert (tmp_path / "model" / "token" / "vocabulary.txt").read_text() == "a b"
        assert on_hub()["token/vocabulary.txt"] == b"a b"

    def test_the_last_job_cannot_be_cancelled_so_that_fit_cannot_hang(self, tmp_path):
        fault = hub.add_fault("commit", "wait")
        push = pushing(tmp_path)

        class Cancelling(Awaited):
            def on_epoch_end(self, epoch, logs=None):
                assert fault.reached.wait(60)
                assert not push.last_job.cancel()
                fault.release.set()

        small_model(lineages()[0]).fit(X, Y, verbose=0, callbacks=[push, Cancelling(push)])
        assert hub.commits("user/model")[0] == "Training in progress, epoch 0"

    def test_a_long_upload_has_all_its_tries_left_at_its_first_failure(self, tmp_path, monkeypatch):
        clock = [0.0]
        monkeypatch.setattr(kc, "_now", lambda: clock[0])
        monkeypatch.setattr(kc, "_wait_for", lambda event, seconds: clock.__setitem__(0, clock[0] + seconds))
        monkeypatch.setattr(kc, "REQUEST_SECONDS", 1e9)
        hub.add_fault("commit", 503)
        push = pushing(tmp_path, save_strategy="no")
        push.set_model(small_model(lineages()[0]))
        plain_try = kc._Upload._commit

        def slow_try(upload):
            clock[0] += 10 * kc.FINAL_SECONDS
            return plain_try(upload)

        monkeypatch.setattr(kc._Upload, "_commit", slow_try)
        push.on_train_end()
        assert push.last_job.exception() is None
        assert hub.commits("user/model") == ["End of training"]

    @pytest.mark.parametrize("name", ["answer_f1", "tower_score", "val_interval_f1", "previous_reward"])
    def test_metric_names_are_found_as_words_only(self, name):
        assert kc._hub_metric(name) == ("f1" if name.endswith("f1") else name)

    def test_the_token_is_not_in_the_file_name_of_an_error(self):
        error = kc._redacted(OSError(2, f"no {WRITE}", f"/x/{WRITE}"), WRITE)
        assert WRITE not in str(error) + repr(error)

    def test_labels_may_have_none_among_them(self, keras):
        received = evaluate(small_model(keras), tf.data.Dataset.from_tensor_slices((X, (Y, None))).batch(8))
        np.testing.assert_array_equal(received.labels[0], Y)

    def test_the_pad_token_given_to_generate_pads(self, keras):
        model = TestGenerateOfOwn.model(keras)
        model.generate = lambda inputs, pad_token_id: np.ones((len(inputs), len(inputs)), int)
        data = tf.data.Dataset.from_tensor_slices(X[:3]).batch(2)
        received = evaluate(model, data, predict_with_generate=True, generate_kwargs={"pad_token_id": 7})
        assert received.predictions.tolist() == [[1, 1], [1, 1], [1, 7]]


class TestUploadCommand:
    @pytest.mark.filterwarnings("ignore:The final state could not be pushed")
    def test_the_command_of_the_warning_pushes_what_would_have_been_pushed(self, tmp_path, caplog):
        model = small_model(lineages()[0])
        push = pushing(tmp_path)
        folder = tmp_path / "model"
        (folder / "notes").mkdir()
        for name in ("notes/mine.txt", ".env", "notes/.env", "key.pem", "notes/token", "token"):
            (folder / name).write_text("x")
        hub.add_fault("commit", 403, times=99)
        model.fit(X, Y, verbose=0, callbacks=[push])
        hub.faults.clear()
        command = next(line for line in caplog.text.splitlines() if " upload user/model " in line)
        scripts = pathlib.Path(sys.executable).parent
        environment = {**os.environ, "HF_TOKEN": WRITE, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        run = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
        model_files = {path.name for path in folder.iterdir() if path.is_file()} - {".env", "key.pem", "token"}
        assert on_hub().keys() - {".gitattributes"} == model_files | {"notes/mine.txt"}


class TestCheckpoint:
    DATA = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)

    @pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "legacy"])
    def test_resuming_from_the_hub_ends_in_the_same_bits(self, keras, tmp_path, optimizer):
        def build():
            legacy = optimizer == "legacy" and keras not in KERAS3
            return small_model(keras, keras.optimizers.legacy.Adam() if legacy else optimizer.replace("legacy", "sgd"))

        straight = build()
        straight.fit(self.DATA, epochs=4, verbose=0)
        build_and_stop = build()
        build_and_stop.fit(self.DATA, epochs=2, verbose=0, callbacks=[pushing(tmp_path, checkpoint=True)])
        resumed = build()
        last = load_repo_checkpoint(resumed, "user/model")
        assert last == {"epoch": 1}
        resumed.fit(self.DATA, initial_epoch=last["epoch"] + 1, epochs=4, verbose=0)
        for received, expected in zip(state_of(resumed), state_of(straight), strict=True):
            np.testing.assert_array_equal(received, expected)

    def test_a_new_process_resumes_in_the_same_bits(self, keras, tmp_path):
        whole = small_model(keras)
        fit_in_order(whole, epochs=4)
        fit_in_order(small_model(keras), epochs=2, callbacks=[pushing(tmp_path, "resumed", checkpoint=True)])
        resuming = f"""
import numpy, test_keras_callbacks as tests
model = tests.small_model(tests.lineages()[{lineages().index(keras)}])
last = tests.load_repo_checkpoint(model, "user/resumed", token=tests.WRITE)
tests.fit_in_order(model, initial_epoch=last["epoch"] + 1, epochs=4)
numpy.savez({str(tmp_path / "state.npz")!r}, *tests.state_of(model))
"""
        children((resuming, {}))
        with np.load(tmp_path / "state.npz") as state:
            for left, right in zip(state.values(), state_of(whole), strict=True):
                np.testing.assert_array_equal(left, right)

    def test_after_the_first_epoch_the_epoch_is_0_and_nothing_is_pickled(self, keras, tmp_path):
        small_model(keras).fit(self.DATA, verbose=0, callbacks=[pushing(tmp_path, checkpoint=True)])
        folder = tmp_path / "model" / "checkpoint"
        assert json.loads((folder / "state.json").read_text())["epoch"] == 0
        with np.load(folder / "state.npz", allow_pickle=False) as archive:
            assert all(archive[name].dtype != object for name in archive.files)
        assert load_repo_checkpoint(small_model(keras), tmp_path / "model") == {"epoch": 0}

    def test_mixed_float16_resumes_with_its_loss_scale(self, keras, tmp_path):
        keras.mixed_precision.set_global_policy("mixed_float16")
        try:
            model, other = small_model(keras), small_model(keras)
            model.fit(self.DATA, epochs=2, verbose=0, callbacks=[pushing(tmp_path, checkpoint=True)])
            load_repo_checkpoint(other, tmp_path / "model")
            model.fit(self.DATA, verbose=0)
            other.fit(self.DATA, verbose=0)
        finally:
            keras.mixed_precision.set_global_policy("float32")
        np.testing.assert_array_equal(other.get_weights()[0], model.get_weights()[0])

    def test_the_table_of_the_card_goes_on_where_it_stood(self, keras, tmp_path):
        small_model(keras).fit(self.DATA, epochs=2, verbose=0, callbacks=[pushing(tmp_path, checkpoint=True)])
        resumed = small_model(keras)
        load_repo_checkpoint(resumed, tmp_path / "model")
        push = pushing(tmp_path, checkpoint=True)
        resumed.fit(self.DATA, initial_epoch=2, epochs=4, verbose=0, callbacks=[push])
        rows = re.findall(r"^\| (\d+) \|", on_hub()["README.md"].decode(), re.MULTILINE)
        assert rows == ["0", "1", "2", "3"]
        assert len(push.training_history) == 2


class TestCard:
    FACTS = {
        "language": "en",
        "license": "mit",
        "tags": ["vision", "a\n---\nb: <b>"],
        "finetuned_from": "google/base",
        "tasks": "image-classification",
        "dataset": "Digits | of\nUCI",
        "dataset_tags": "mnist",
        "dataset_args": "default",
    }

    @staticmethod
    def card_of(tmp_path, keras, epochs, **facts):
        """The card on the Hub after epochs with these logs."""
        push = pushing(tmp_path, **facts)
        push.set_model(small_model(keras))
        push.set_params({"epochs": len(epochs), "steps": 3, "verbose": 0})
        push.on_train_begin()
        for epoch, logs in enumerate(epochs):
            metric = KerasMetricCallback(lambda p, l: {k: v for k, v in logs.items() if "1" in k}, X, batch_size=32)
            metric.set_model(push.model)
            metric.on_epoch_end(epoch, {})
            push.on_epoch_end(epoch, logs)
        push.on_train_end()
        return on_hub()["README.md"].decode()

    def test_the_metadata_come_back_from_model_card(self, keras, tmp_path):
        logs = {"loss": 0.5, "accuracy": 0.9, "val_loss": 0.7, "val_accuracy": 0.8, "rouge1": 31.5, "f1_macro": 0.75}
        text = self.card_of(tmp_path, keras, [{"loss": 1.0}, logs], **self.FACTS)
        data = huggingface_hub.ModelCard(text).data
        assert data.library_name == ("keras" if keras in KERAS3 else "tf-keras")
        assert data.tags == ["vision", "a --- b: <b>", "generated_from_keras_callback"]
        assert (data.language, data.license, data.base_model) == (["en"], "mit", "google/base")
        assert (data.datasets, data.pipeline_tag) == (["mnist"], "image-classification")
        assert data.metrics == ["accuracy", "f1", "rouge"]
        results = [(r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results]
        assert results == [
            ("accuracy", "val_accuracy", 0.8),
            ("rouge", "rouge1", 31.5),
            ("f1", "f1_macro", 0.75),
        ]
        first = data.eval_results[0]
        assert (first.task_type, first.dataset_type, first.dataset_name) == (
            "image-classification",
            "mnist",
            "Digits | of UCI",
        )
        assert first.dataset_config == "default"

    def test_the_table_has_every_epoch_and_all_columns(self, keras, tmp_path):
        epochs = [
            {"loss": 1.23456},
            {"loss": float("nan"), "val_loss": 0.00012346},
            {"late|r": 7, "val_loss": float("inf")},
        ]
        text = self.card_of(tmp_path, keras, epochs)
        table = [line for line in text.splitlines() if line.startswith("| ")]
        assert table == [
            "| Epoch | loss | Validation loss | late\\|r |",
            "| ---: | ---: | ---: | ---: |",
            "| 0 | 1.235 |  |  |",
            "| 1 | nan | 0.0001235 |  |",
            "| 2 |  | inf | 7 |",
        ]
        data = huggingface_hub.ModelCard(text).data
        assert data.eval_results is None

    @pytest.mark.parametrize(
        ("key", "metric"),
        [
            ("val_accuracy", "accuracy"),
            ("val_sparse_categorical_accuracy", "accuracy"),
            ("rouge1", "rouge"),
            ("rougeLsum1", "rouge"),
            ("f1_macro", "f1"),
            ("sacrebleu1", "sacrebleu"),
            ("val_root_mean_squared_error", "rmse"),
            ("val_mse", "mse"),
            ("val_auc", "roc_auc"),
            ("own_score1", "own_score1"),
        ],
    )
    def test_metric_types_are_the_names_of_the_hub(self, tmp_path, key, metric):
        text = self.card_of(tmp_path, lineages()[0], [{key: 0.5}], **self.FACTS)
        (result,) = huggingface_hub.ModelCard(text).data.eval_results
        assert (result.metric_type, result.metric_name, result.metric_value) == (metric, key, 0.5)

    def test_no_base_model_from_a_local_path_and_no_tag_from_an_unknown_task(self, keras, tmp_path):
        facts = {"finetuned_from": str(tmp_path), "tasks": "guessing well"}
        data = huggingface_hub.ModelCard(self.card_of(tmp_path, keras, [{"loss": 1.0}], **facts)).data
        assert (data.base_model, data.pipeline_tag) == (None, None)

    @pytest.mark.parametrize("task", ["text-classification", "sentence-similarity", "video-classification", "robotics"])
    def test_a_task_of_the_hub_is_the_pipeline_tag(self, tmp_path, task):
        data = huggingface_hub.ModelCard(self.card_of(tmp_path, lineages()[0], [{"loss": 1.0}], tasks=task)).data
        assert data.pipeline_tag == task

    def test_of_a_card_that_cannot_be_written_nothing_is_pushed(self, tmp_path):
        model = small_model(lineages()[0])
        model.fit(X, Y, verbose=0, callbacks=[pushing(tmp_path, dataset="half a pair: \ud800")])
        assert "README.md" not in on_hub()
        assert not (tmp_path / "model" / "README.md").exists()

    def test_the_optimizer_is_readable_with_its_schedule(self, keras, tmp_path):
        push = pushing(tmp_path)
        schedule = keras.optimizers.schedules.PolynomialDecay(0.25, 1234)
        push.set_model(small_model(keras, keras.optimizers.Adam(schedule)))
        push.on_train_end()
        text = on_hub()["README.md"].decode()
        config = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
        assert config["class_name"] == "Adam"
        assert config["learning_rate"]["config"]["decay_steps"] == 1234
        assert config["beta_1"] == pytest.approx(0.9)

    def test_the_lines_that_load_the_model_work(self, keras, tmp_path):
        model = small_model(keras)
        model.fit(X, Y, verbose=0, callbacks=[pushing(tmp_path)])
        code = re.search(r"```python\n(.*?)```", on_hub()["README.md"].decode(), re.DOTALL)[1]
        names = {}
        exec(code, names)
        np.testing.assert_array_equal(names["model"].predict(X, verbose=0), model.predict(X, verbose=0))

    def test_a_card_that_cannot_be_generated_blocks_nothing(self, keras, tmp_path, caplog):
        class Odd(str):
            def __str__(self):
                raise ZeroDivisionError("odd")

        model = small_model(keras)
        model.fit(X, Y, verbose=0, callbacks=[pushing(tmp_path, license=Odd("mit"))])
        assert "README.md" not in on_hub()
        assert "No model card was written: ZeroDivisionError: odd" in caplog.text
        np.testing.assert_array_equal(load(keras, download(tmp_path / "d")).get_weights()[0], model.get_weights()[0])


FIRST = lineages()[0]  # what is about the Hub alone is tested with one Keras package


@pytest.fixture(scope="module")
def model():
    """One compiled model for all tests about the Hub: each fit goes on where the one before ended."""
    model = small_model(FIRST)
    model.fit(X, Y, verbose=0)
    return model


@pytest.fixture
def repo(tmp_path):
    """A name of its own, so that a request that a test left behind never meets another test's repository."""
    return tmp_path.name


def train(model, *callbacks, epochs=1, **options):
    return model.fit(X, Y, epochs=epochs, verbose=0, callbacks=list(callbacks), **options)


def at_epoch_end(action):
    """A callback that calls the action with each epoch that ends; list it after the one that pushes."""
    return FIRST.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: action(epoch))


def assert_same_weights(folder, model):
    for loaded, expected in zip(load(FIRST, folder).get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(loaded, expected)


def asked(stage):
    """How many requests of a stage the stand-in has got."""
    return sum(kind == stage for kind, _ in hub.requests)


class Clock:
    """Time that passes only while somebody waits for the next try."""

    def __init__(self, monkeypatch, stage):
        self.seconds, self.stage = 0.0, stage
        self.waits = collections.Counter()  # seconds waited after so many requests of the stage
        monkeypatch.setattr(kc, "_now", lambda: self.seconds)
        monkeypatch.setattr(kc, "_wait_for", self.wait_for)

    def wait_for(self, event, seconds):
        self.waits[asked(self.stage)] += seconds
        self.seconds += seconds


# The client itself waits a second before it repeats these, so there are fewer of them.
STAGES_THE_CLIENT_REPEATS = ("preupload", "batch", "lfs")
PASSING = [
    (stage, kind)
    for stage in ("info", "preupload", "batch", "lfs", "commit")
    for kind in (500, 503, 429, 408, "drop", "hang", "lost")
    if stage not in STAGES_THE_CLIENT_REPEATS or kind in (503, "hang") or (stage == "lfs" and kind in (429, "drop"))
] + [("commit", status) for status in (409, 412, 423, 425)]
REFUSALS = [("info", 404), ("preupload", 403), ("batch", 403), ("lfs", 403), ("lfs", 413), ("commit", 401)]
REFUSALS += [("commit", 413)]


class TestFaults:
    @pytest.mark.parametrize(("stage", "kind"), PASSING)
    def test_a_fault_that_passes_costs_the_final_state_nothing(self, model, tmp_path, repo, monkeypatch, stage, kind):
        callback = pushing(tmp_path, repo, save_strategy="no")
        monkeypatch.setattr(kc, "REQUEST_SECONDS", 0.5 if kind == "hang" else 20.0)
        fault = hub.add_fault(stage, kind)
        train(model, callback)
        assert fault.reached.is_set()
        assert hub.commits(f"user/{repo}") == ["End of training"]
        assert_same_weights(download(tmp_path / "downloaded", repo), model)
        assert_same_weights(tmp_path / repo, model)

    @pytest.mark.parametrize(("stage", "kind"), PASSING)
    def test_a_save_during_training_is_tried_again(self, model, tmp_path, repo, monkeypatch, stage, kind):
        callback = pushing(tmp_path, repo)
        monkeypatch.setattr(kc, "REQUEST_SECONDS", 0.5 if kind == "hang" else 20.0)
        fault = hub.add_fault(stage, kind)
        train(model, callback, at_epoch_end(lambda epoch: callback.last_job.result(timeout=60)))
        assert fault.reached.is_set()
        assert hub.commits(f"user/{repo}")[0] == "Training in progress, epoch 0"
        assert hub.commits(f"user/{repo}")[1:] in ([], ["End of training"])  # nothing new, nothing to commit
        assert_same_weights(download(tmp_path / "downloaded", repo), model)
        assert_same_weights(tmp_path / repo, model)

    @pytest.mark.parametrize(("stage", "status"), REFUSALS)
    def test_a_refusal_is_not_repeated_for_the_same_save(self, model, tmp_path, repo, caplog, stage, status):
        callback = pushing(tmp_path, repo)
        fault = hub.add_fault(stage, status, times=1)
        train(model, callback, at_epoch_end(lambda epoch: callback.last_job.exception(timeout=60)))
        warning = next(r for r in caplog.records if r.name == "keras_callbacks" and r.levelname == "WARNING")
        assert str(status) in warning.getMessage()
        assert fault.times == 0
        assert hub.commits(f"user/{repo}") == ["End of training"]
        assert_same_weights(download(tmp_path / "downloaded", repo), model)

    @pytest.mark.parametrize(("stage", "status"), REFUSALS)
    def test_a_refused_final_state_ends_at_once_with_the_documented_warning(
        self, model, tmp_path, repo, caplog, stage, status
    ):
        callback = pushing(tmp_path, repo, save_strategy="no")
        before = asked(stage)
        hub.add_fault(stage, status, times=1000)
        with pytest.warns(UserWarning, match="could not be pushed") as warned:
            history = train(model, callback)
        assert len(history.history["loss"]) == 1
        assert asked(stage) - before == 1
        assert kc._status_of(callback.last_job.exception()) == status
        error = next(r.getMessage() for r in caplog.records if r.levelname == "ERROR" and r.name == "keras_callbacks")
        told = next(str(w.message) for w in warned if "could not be pushed" in str(w.message))
        for message in (error, told):
            assert str(status) in message and str(tmp_path / repo) in message
            assert re.search(rf"(hf|huggingface-cli) upload user/{repo} ", message)
        assert_same_weights(tmp_path / repo, model)

    @pytest.mark.parametrize(
        ("stage", "kind"),
        [("info", 500), ("commit", 503), ("commit", "drop"), ("any", "down")]
        + [(stage, "hang") for stage in ("preupload", "lfs", "commit")],
    )
    def test_fit_returns_normally_when_the_final_state_cannot_be_pushed(
        self, model, tmp_path, repo, caplog, monkeypatch, stage, kind
    ):
        callback = pushing(tmp_path, repo, save_strategy="no")
        monkeypatch.setattr(kc, "FINAL_SECONDS", 0.7)
        monkeypatch.setattr(kc, "REQUEST_SECONDS", 0.3 if kind == "hang" else 20.0)
        hub.down = kind == "down"
        hub.add_fault(stage, kind, times=1000)
        with pytest.warns(UserWarning, match=rf"could not be pushed(.|\n)*upload user/{repo} "):
            history = train(model, callback)
        assert len(history.history["loss"]) == 1
        assert callback.last_job.exception() is not None
        assert [r for r in caplog.records if r.levelname == "ERROR" and str(tmp_path / repo) in r.getMessage()]
        assert_same_weights(tmp_path / repo, model)

    def test_a_try_that_wakes_up_late_does_not_undo_the_newer_state(self, model, tmp_path, repo, monkeypatch):
        callback = pushing(tmp_path, repo)
        monkeypatch.setattr(kc, "REQUEST_SECONDS", 0.5)
        late = hub.add_fault("commit", "wait")
        train(model, callback)
        before = hub.commits(f"user/{repo}")
        answers = asked("commit")
        late.release.set()
        monkeypatch.setattr(kc, "REQUEST_SECONDS", 20.0)
        train(model, callback)
        assert answers >= 2
        assert hub.commits(f"user/{repo}")[: len(before)] == before
        assert_same_weights(download(tmp_path / "downloaded", repo), model)

    def test_a_save_that_is_given_up_warns_once_and_the_next_save_is_pushed(
        self, model, tmp_path, repo, caplog, monkeypatch
    ):
        callback = pushing(tmp_path, repo)
        clock = Clock(monkeypatch, "commit")
        fault = hub.add_fault("commit", 503, times=1000)

        def after(epoch):
            if epoch == 0:
                callback.last_job.exception(timeout=60)
                fault.times = 0
            else:
                callback.last_job.result(timeout=60)

        train(model, callback, at_epoch_end(after), epochs=2)
        warned = [r.getMessage() for r in caplog.records if r.name == "keras_callbacks"]
        assert len(warned) == 1 and "epoch 0" in warned[0] and "503" in warned[0]
        assert clock.seconds <= kc.BACKGROUND_SECONDS
        assert hub.commits(f"user/{repo}")[0] == "Training in progress, epoch 1"

    @pytest.mark.parametrize("strategy", ["epoch", "no"])
    def test_a_hub_that_comes_up_again_gets_the_state(self, model, tmp_path, repo, monkeypatch, strategy):
        callback = pushing(tmp_path, repo, save_strategy=strategy)
        hub.down = True
        tries = []

        def third_try(event, seconds):
            tries.append(seconds)
            hub.down = len(tries) < 3

        monkeypatch.setattr(kc, "_wait_for", third_try)
        train(model, callback, at_epoch_end(lambda epoch: strategy == "no" or callback.last_job.result(timeout=60)))
        assert len(tries) >= 3
        assert_same_weights(download(tmp_path / "downloaded", repo), model)

    @pytest.mark.parametrize("when", ["background", "final"])
    def test_waits_grow_exponentially_with_jitter_up_to_the_limit(self, model, tmp_path, repo, monkeypatch, when):
        monkeypatch.setattr(kc, "FIRST_WAIT", 1.0)
        monkeypatch.setattr(kc, "BACKGROUND_SECONDS", 60.0)
        monkeypatch.setattr(kc, "FINAL_SECONDS", 300.0)
        callback = pushing(tmp_path, repo)
        drive(callback, model)
        clock = Clock(monkeypatch, "commit")
        hub.add_fault("commit", 500, times=1000)
        if when == "final":
            with pytest.warns(UserWarning, match="could not be pushed"):
                callback.on_train_end()
        else:
            callback.on_epoch_end(0, {})
            callback.last_job.exception(timeout=60)
        factors = [clock.waits[tries] / 2 ** (tries - 1) for tries in sorted(clock.waits)]
        assert all(1 <= factor <= 2 for factor in factors)
        assert len(set(factors)) > 1
        limit = 300 if when == "final" else 60
        assert limit / 4 < clock.seconds <= limit

    @pytest.mark.parametrize(
        ("status", "header"), [(429, "7"), (503, "7"), (429, email.utils.formatdate(2e9, usegmt=True))]
    )
    def test_retry_after_is_honoured(self, model, tmp_path, repo, monkeypatch, status, header):
        monkeypatch.setattr(kc, "FINAL_SECONDS", 3e9)
        callback = pushing(tmp_path, repo, save_strategy="no")
        clock = Clock(monkeypatch, "commit")
        hub.add_fault("commit", status, headers={"Retry-After": header})
        if header != "7":
            monkeypatch.setattr(kc.time, "time", lambda: 2e9 - 90)
        drive(callback, model)
        callback.on_train_end()
        assert clock.waits == {1: pytest.approx(7 if header == "7" else 90)}
        assert hub.commits(f"user/{repo}") == ["End of training"]

    def test_a_retry_after_beyond_the_limit_gives_the_save_up(self, model, tmp_path, repo, monkeypatch, caplog):
        callback = pushing(tmp_path, repo)
        clock = Clock(monkeypatch, "commit")
        hub.add_fault("commit", 429, headers={"Retry-After": "86400"})
        drive(callback, model)
        callback.on_epoch_end(0, {})
        assert kc._status_of(callback.last_job.exception(timeout=60)) == 429
        assert clock.seconds == 0
        callback.on_train_end()
        assert hub.commits(f"user/{repo}") == ["End of training"]


def drive(callback, model):
    """Begins a training whose hooks the test calls itself."""
    callback.set_model(model)
    callback.set_params({"verbose": 0, "epochs": 1})
    callback.on_train_begin()


GENERATED = "<!-- Generated by keras_callbacks."


class TestOthers:
    HUMAN = b"---\nlicense: mit\n---\n# Written by a human\n"

    def human_edits_on_hub(self, repo, name="README.md", content=HUMAN):
        hub.commit(f"user/{repo}", "Update README.md", {name: content})

    def pushed(self, callback):
        """Drives one epoch's end and waits for its upload."""
        callback.on_epoch_end(len(callback.training_history), {"loss": 0.5 / (1 + len(callback.training_history))})
        return callback.last_job.result(timeout=60)

    @pytest.fixture
    def callback(self, tmp_path, repo, model):
        callback = pushing(tmp_path, repo, checkpoint=True)
        drive(callback, model)
        return callback

    def test_a_humans_card_on_the_hub_stays_through_all_later_saves(self, callback, repo):
        self.pushed(callback)
        self.human_edits_on_hub(repo)
        self.pushed(callback)
        self.pushed(callback)
        callback.on_train_end()
        assert on_hub(repo)["README.md"] == self.HUMAN

    def test_a_humans_card_on_the_hub_from_before_the_run_stays(self, tmp_path, repo, model):
        hub.commit(f"user/{repo}", "initial commit", {})
        self.human_edits_on_hub(repo)
        callback = pushing(tmp_path, repo)
        drive(callback, model)
        self.pushed(callback)
        self.pushed(callback)
        callback.on_train_end()
        assert on_hub(repo)["README.md"] == self.HUMAN

    def test_a_humans_local_card_is_left_as_it_is_and_pushed(self, callback, tmp_path, repo):
        self.pushed(callback)
        (tmp_path / repo / "README.md").write_bytes(self.HUMAN)
        self.pushed(callback)
        callback.on_train_end()
        assert (tmp_path / repo / "README.md").read_bytes() == self.HUMAN == on_hub(repo)["README.md"]

    def test_the_card_on_the_hub_wins_where_a_human_edited_both(self, callback, tmp_path, repo):
        self.pushed(callback)
        local = self.HUMAN.replace(b"human", b"local human")
        (tmp_path / repo / "README.md").write_bytes(local)
        self.human_edits_on_hub(repo)
        self.pushed(callback)
        self.pushed(callback)
        assert on_hub(repo)["README.md"] == self.HUMAN
        assert (tmp_path / repo / "README.md").read_bytes() == local

    @pytest.mark.parametrize("stage", ["info", "preupload", "lfs", "commit"])
    def test_an_edit_that_lands_during_an_upload_is_kept(self, callback, tmp_path, repo, model, stage):
        self.pushed(callback)
        train(model)
        fault = hub.add_fault(stage, "wait")
        callback.on_epoch_end(1, {"loss": 0.1})
        assert fault.reached.wait(60)
        self.human_edits_on_hub(repo)
        fault.release.set()
        callback.last_job.result(timeout=60)
        callback.on_train_end()
        assert on_hub(repo)["README.md"] == self.HUMAN
        assert_same_weights(download(tmp_path / "downloaded", repo), model)

    def test_files_on_the_hub_that_this_run_did_not_write_stay(self, callback, repo):
        self.pushed(callback)
        self.human_edits_on_hub(repo, "notes/results.md", b"mine")
        self.pushed(callback)
        callback.on_train_end()
        assert on_hub(repo)["notes/results.md"] == b"mine"
        assert ".gitattributes" in on_hub(repo)

    def test_files_that_only_an_earlier_save_wrote_go_with_the_commit_that_replaces_them(self, tmp_path, repo, model):
        shards = [["vocab.json", "old/part-1.txt", "old/part-2.txt"], ["vocab.json"]]

        class Tokenizer:
            def save_pretrained(self, folder):
                for name in shards[0]:
                    path = pathlib.Path(folder, name)
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(f"{name} of {len(shards)}")

        callback = pushing(tmp_path, repo, tokenizer=Tokenizer())
        drive(callback, model)
        self.pushed(callback)
        (tmp_path / repo / "old" / "mine.txt").write_text("mine")
        before = set(on_hub(repo))
        del shards[0]
        self.pushed(callback)
        assert set(on_hub(repo)) == before - {"old/part-1.txt", "old/part-2.txt"} | {"old/mine.txt"}
        assert hub.commits(f"user/{repo}") == [f"Training in progress, epoch {epoch}" for epoch in (0, 1)]
        assert sorted(p.name for p in (tmp_path / repo / "old").iterdir()) == ["mine.txt"]

    @pytest.mark.parametrize("name", ["events.out.tfevents.1", "logs/growing.h5"])
    def test_a_file_that_grows_during_the_upload_does_not_break_it(self, callback, tmp_path, repo, name):
        path = tmp_path / repo / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"begin ")
        faults = [hub.add_fault(stage, "wait") for stage in ("preupload", "commit")]
        callback.on_epoch_end(0, {"loss": 0.5})
        for fault in faults:
            assert fault.reached.wait(60)
            with path.open("ab") as file:
                file.write(b"more " * 1000)
            fault.release.set()
        callback.last_job.result(timeout=60)
        assert on_hub(repo)[name] == b"begin "
        self.pushed(callback)
        assert on_hub(repo)[name] == path.read_bytes()

    @pytest.mark.parametrize("folder", [".", "logs", "logs/deeper"])
    @pytest.mark.parametrize(
        "name",
        [".env", ".env.local", ".Env", ".git/config", ".netrc", "_netrc", ".cache/x", "my.pem", "token", "a/token"],
    )
    def test_credentials_and_caches_are_not_pushed(self, folder, name, tmp_path, repo):
        callback = pushing(tmp_path, repo)
        path = tmp_path / repo / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")
        (path.parent / "plain.txt").symlink_to(path)
        names = set(kc._pushable_files(callback.output_dir))
        assert names == set()

    def test_no_content_of_a_credential_reaches_the_hub(self, callback, tmp_path, repo):
        folder = tmp_path / repo
        (folder / "logs").mkdir()
        for name in (".env", "logs/.netrc", "logs/token", "my.pem"):
            (folder / name).write_text("the password")
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("the password")
        (folder / "settings.txt").symlink_to(folder / ".env")
        (folder / "history").symlink_to(folder / ".git", target_is_directory=True)
        (folder / "innocent.txt").write_text("hello")
        self.pushed(callback)
        assert on_hub(repo)["innocent.txt"] == b"hello"
        assert not [name for name, content in on_hub(repo).items() if b"the password" in content]

    def test_links_are_followed_only_where_they_stay_inside(self, callback, tmp_path, repo):
        folder, outside = tmp_path / repo, tmp_path / "outside"
        outside.mkdir()
        (outside / "private.txt").write_text("private")
        (folder / "real").mkdir()
        (folder / "real" / "a.txt").write_text("inside")
        for name, target in {
            "out.txt": outside / "private.txt", "out": outside, "up": tmp_path, "loop": folder, "self": folder / "self",
            "gone": folder / "nothing", "real/back": folder / "real", "linked.txt": folder / "real" / "a.txt",
            "alias": folder / "real",
        }.items():  # fmt: skip
            (folder / name).symlink_to(target)
        self.pushed(callback)
        texts = {name: content for name, content in on_hub(repo).items() if content in (b"private", b"inside")}
        assert texts == dict.fromkeys(["real/a.txt", "linked.txt", "alias/a.txt"], b"inside")

    @pytest.mark.parametrize(("token", "owner"), [("hf_read", "user"), (WRITE, "other"), ("hf_wrong", "user")])
    def test_a_token_that_may_not_write_is_refused_at_construction_without_a_commit(self, tmp_path, token, owner):
        hub.commit(f"{owner}/taken", "initial commit", {"a.txt": b"a"})
        with pytest.raises(huggingface_hub.utils.HfHubHTTPError) as raised:
            PushToHubCallback(tmp_path / "taken", hub_model_id=f"{owner}/taken", hub_token=token)
        assert kc._status_of(raised.value) in (401, 403)
        assert hub.commits(f"{owner}/taken") == []
        assert token not in "".join(traceback.format_exception(raised.value)) + repr(raised.value)

    def test_a_new_repository_in_somebody_elses_name_is_refused_at_construction(self, tmp_path):
        with pytest.raises(huggingface_hub.utils.HfHubHTTPError):
            PushToHubCallback(tmp_path / "new", hub_model_id="other/new", hub_token=WRITE)

    def test_the_card_that_the_hub_refuses_does_not_block_the_weights(self, model, tmp_path, repo, caplog):
        callback = pushing(tmp_path, repo, tags=["REFUSE"])
        drive(callback, model)
        self.pushed(callback)
        assert "README.md" not in on_hub(repo)
        assert_same_weights(download(tmp_path / "downloaded", repo), model)
        assert any("without the model card" in r.getMessage() for r in caplog.records)


class TestToken:
    """The token, which the stand-in echoes in its errors, stays out of everything that the module writes."""

    SECRET = "hf_secretSECRETsecret"

    @pytest.fixture(autouse=True)
    def known_token(self, monkeypatch):
        monkeypatch.setattr(hub, "TOKENS", {**hub.TOKENS, self.SECRET: ("user", "write")})

    def echo(self, stage, status, times=1000):
        text = f"no right with Bearer {self.SECRET}"
        headers = {"X-Error-Message": text, "X-Request-Id": self.SECRET}
        return hub.add_fault(stage, status, times, headers=headers, body=json.dumps({"error": text}).encode())

    @pytest.mark.parametrize(
        ("stage", "status"),
        [("info", 403), ("info", 404), ("preupload", 403), ("batch", 400)]
        + [("lfs", 403), ("commit", 401), ("commit", 500), ("yaml", 403)],
    )
    def test_is_in_no_message_about_a_failed_push(
        self, model, tmp_path, repo, caplog, capfd, monkeypatch, stage, status
    ):
        monkeypatch.setattr(kc, "FINAL_SECONDS", 0.0)
        monkeypatch.setattr(kc, "BACKGROUND_SECONDS", 0.0)
        callback = PushToHubCallback(tmp_path / repo, hub_token=self.SECRET)
        drive(callback, model)
        callback.set_params({"verbose": 1})
        self.echo(stage, status)
        with caplog.at_level(logging.DEBUG, "keras_callbacks"):
            callback.on_epoch_end(0, {"loss": 1.0})
            background = callback.last_job.exception(timeout=60)
            with pytest.warns(UserWarning, match="could not be pushed") as warned:
                callback.on_train_end()
        written = [r.getMessage() for r in caplog.records if r.name == "keras_callbacks"]
        assert len(written) >= 2
        written += [str(w.message) for w in warned] + list(capfd.readouterr()) + [repr(callback), str(vars(callback))]
        for error in (background, callback.last_job.exception()):
            written += traceback.format_exception(error) + [repr(e) + str(e) + str(e.args) for e in kc._causes(error)]
        assert [text for text in written if self.SECRET in text] == []

    def test_is_in_no_file_and_no_commit(self, model, tmp_path, repo, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", self.SECRET)
        callback = PushToHubCallback(tmp_path / repo, hub_token=self.SECRET, checkpoint=True)
        train(model, callback)
        contents = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
        contents += [json.dumps(hub.commits(f"user/{repo}")).encode(), *on_hub(repo).values()]
        assert len(contents) > 5
        assert not [content for content in contents if self.SECRET.encode() in content]

    @pytest.mark.parametrize("stage", ["create", "preupload"])
    def test_is_not_in_the_error_at_construction(self, tmp_path, repo, stage):
        self.echo(stage, 403)
        with pytest.raises(huggingface_hub.utils.HfHubHTTPError) as raised:
            PushToHubCallback(tmp_path / repo, hub_token=self.SECRET)
        assert self.SECRET not in "".join(traceback.format_exception(raised.value)) + repr(raised.value)

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_is_not_in_the_error_of_load_repo_checkpoint(self, model, repo, status):
        self.echo("info", status)
        with pytest.raises(Exception) as raised:
            load_repo_checkpoint(model, f"user/{repo}", token=self.SECRET)
        assert self.SECRET not in "".join(traceback.format_exception(raised.value)) + repr(raised.value)


@contextlib.contextmanager
def full_disk(room):
    """As if the disk had room for so many bytes in each file: writing beyond them is an OSError."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class BrittleTokenizer:
    """Writes two files, or fails between them."""

    broken = False

    def save_pretrained(self, folder):
        pathlib.Path(folder, "a_vocab.txt").write_text("half")
        if self.broken:
            raise OSError("the vocabulary is gone")
        pathlib.Path(folder, "b_vocab.txt").write_text("whole")


class TestSavingFails:
    @pytest.fixture
    def callback(self, tmp_path, repo, model):
        callback = pushing(tmp_path, repo, checkpoint=True, tokenizer=BrittleTokenizer())
        drive(callback, model)
        callback.on_epoch_end(0, {"loss": 0.5})
        callback.last_job.result(timeout=60)
        return callback

    def assert_untouched_and_usable(self, callback, before, model, tmp_path, repo):
        assert contents(callback.output_dir) == before
        callback.on_epoch_end(2, {"loss": 0.25})
        callback.on_train_end()
        assert callback.last_job.exception() is None
        assert_same_weights(download(tmp_path / "downloaded", repo), model)

    def test_a_tokenizer_that_cannot_be_written_is_named(self, callback, tmp_path, repo, model):
        before = contents(callback.output_dir)
        callback.tokenizer.broken = True
        with pytest.raises(RuntimeError, match=rf"write the tokenizer to .*{repo}: OSError: the vocabulary is gone"):
            callback.on_epoch_end(1, {})
        callback.tokenizer.broken = False
        self.assert_untouched_and_usable(callback, before, model, tmp_path, repo)

    def test_a_full_disk_is_named(self, callback, tmp_path, repo, model):
        before = contents(callback.output_dir)
        with full_disk(room=3000), pytest.raises(RuntimeError, match=rf"write the model to .*{repo}: .*File too large"):
            callback.on_epoch_end(1, {})
        self.assert_untouched_and_usable(callback, before, model, tmp_path, repo)

    def test_a_model_that_cannot_be_serialised_is_named(self, keras, tmp_path, repo):
        class Stubborn(keras.layers.Layer):
            def call(self, inputs):
                return inputs

            def get_config(self):
                raise NotImplementedError("no config of mine")

        model = keras.Sequential([keras.layers.Input((4,)), Stubborn(), keras.layers.Dense(3)])
        model.compile("adam", "mse")
        with pytest.raises(RuntimeError, match=rf"write the model to .*{repo}: .*no config of mine"):
            model.fit(X, X[:, :3], verbose=0, callbacks=[pushing(tmp_path, repo)])
        assert contents(tmp_path / repo) == {}

    @pytest.mark.parametrize("instead", ["nothing", "a file"])
    def test_a_folder_that_is_gone_is_named(self, callback, repo, instead):
        shutil.rmtree(callback.output_dir)
        if instead == "a file":
            callback.output_dir.write_text("in the way")
        with pytest.raises(RuntimeError, match=rf"Could not write .*{repo}"):
            callback.on_epoch_end(1, {})

    def test_a_folder_in_the_place_of_a_file_leaves_the_other_files(self, callback, repo):
        (callback.output_dir / "b_vocab.txt").unlink()
        (callback.output_dir / "b_vocab.txt").mkdir()
        before = contents(callback.output_dir)
        with pytest.raises(RuntimeError, match=rf"Could not write .*{repo}"):
            callback.on_epoch_end(1, {})
        assert contents(callback.output_dir) == before

    @pytest.mark.parametrize("when", ["epoch", "end"])
    def test_a_snapshot_that_cannot_be_made_is_a_failed_push_only(
        self, callback, monkeypatch, model, tmp_path, repo, caplog, when
    ):
        monkeypatch.setattr(kc, "FINAL_SECONDS", 0.1)
        monkeypatch.setattr(kc, "BACKGROUND_SECONDS", 0.1)
        (callback.output_dir / "large.bin").write_bytes(bytes(9_000_000))
        with full_disk(room=8_000_000):
            if when == "end":
                with pytest.warns(UserWarning, match="could not be pushed"):
                    callback.on_train_end()
            else:
                callback.on_epoch_end(1, {})
                callback.last_job.exception(timeout=60)
        assert "File too large" in str(callback.last_job.exception(timeout=60))
        assert any("File too large" in r.getMessage() for r in caplog.records)
        assert_same_weights(callback.output_dir, model)
        callback.on_epoch_end(2, {})
        callback.last_job.result(timeout=60)
        assert on_hub(repo)["large.bin"] == bytes(9_000_000)


def rewritten(archive, **changes):
    """Rewrites members of an npz file; None removes one."""
    with np.load(archive, allow_pickle=False) as members:
        arrays = {**dict(members), **changes}
    np.savez(archive, **{name: array for name, array in arrays.items() if array is not None})


def rejson(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class Trap:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return exec, ("import os; os.environ['UNPICKLED'] = 'yes'",)


class TestUntrustedCheckpoint:
    DAMAGES = {
        "an archive cut in half": lambda npz, state: npz.write_bytes(npz.read_bytes()[: npz.stat().st_size // 2]),
        "an archive cut at its end": lambda npz, state: npz.write_bytes(npz.read_bytes()[:-30]),
        "a flipped byte": lambda npz, state: npz.write_bytes(
            npz.read_bytes()[:400] + bytes([npz.read_bytes()[400] ^ 255]) + npz.read_bytes()[401:]
        ),
        "no archive": lambda npz, state: npz.write_bytes(b""),
        "a pickle": lambda npz, state: npz.write_bytes(pickle.dumps(Trap())),
        "a pickle inside": lambda npz, state: rewritten(npz, **{"model.0": np.array([Trap()], dtype=object)}),
        "the beginning of another format": lambda npz, state: npz.write_bytes(b"\x93NUMPY"),
        "no epoch beside the weights": lambda npz, state: rewritten(npz, epoch=None),
        "another epoch beside the weights": lambda npz, state: rewritten(npz, epoch=np.array(5)),
        "several epochs": lambda npz, state: rewritten(npz, epoch=np.array([0, 0])),
        "half an epoch": lambda npz, state: rewritten(npz, epoch=np.array(0.5)),
        "a variable too few": lambda npz, state: rewritten(npz, **{"model.1": None}),
        "a variable too many": lambda npz, state: rewritten(npz, **{"model.2": np.zeros(1)}),
        "another shape": lambda npz, state: rewritten(npz, **{"model.1": np.zeros(4, "float32")}),
        "another dtype": lambda npz, state: rewritten(npz, **{"model.1": np.zeros(3, "int32")}),
        "no JSON": lambda npz, state: state.write_text('{"epoch": 0, '),
        "JSON that is no object": lambda npz, state: state.write_text("[0]"),
        "bytes that are no text": lambda npz, state: state.write_bytes(b"\xff\xfe\x00"),
        "no epoch": lambda npz, state: state.write_text("{}"),
        **{
            f"the epoch {value!r}": lambda npz, state, value=value: rejson(state, epoch=value)
            for value in (-1, 1, "0", 0.5, None, True, [0], 10**30, math.nan)
        },
        "a negative epoch throughout": lambda npz, state: (
            rewritten(npz, epoch=np.array(-1)), rejson(state, epoch=-1, history={"-1": {}})
        ),
        "a history that is none": lambda npz, state: rejson(state, history=[1, 2]),
        "no history": lambda npz, state: rejson(state, history={}),
    }  # fmt: skip

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory, model):
        folder = tmp_path_factory.mktemp("saved")
        hub.reset()
        callback = pushing(folder, "saved", checkpoint=True)
        drive(callback, model)
        callback.on_epoch_end(0, {"loss": 0.5})
        callback.last_job.result(timeout=60)
        return folder / "saved" / "checkpoint"

    def refuse(self, model, folder, error=ValueError):
        before = [np.copy(weight) for weight in model.get_weights()]
        with pytest.raises(error):
            load_repo_checkpoint(model, folder)
        for now, then in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(now, then)

    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
    def test_a_damaged_checkpoint_is_refused_before_a_weight_changes(self, saved, tmp_path, damage):
        shutil.copytree(saved, tmp_path / "checkpoint")
        damage(tmp_path / "checkpoint" / "state.npz", tmp_path / "checkpoint" / "state.json")
        self.refuse(small_model(FIRST), tmp_path)
        assert "UNPICKLED" not in os.environ

    def test_the_undamaged_one_is_accepted(self, saved, model):
        other = small_model(FIRST)
        assert load_repo_checkpoint(other, saved.parent) == {"epoch": 0}
        with np.load(saved / "state.npz") as archive:
            np.testing.assert_array_equal(other.get_weights()[0], archive["model.0"])

    @pytest.mark.parametrize("optimizer", ["sgd", "adamax", None])
    def test_another_optimizer_is_refused(self, saved, optimizer):
        other = small_model(FIRST)
        if optimizer is None:
            other = FIRST.Sequential([FIRST.layers.Input((4,)), FIRST.layers.Dense(3)])
        else:
            other.compile(optimizer, "sparse_categorical_crossentropy")
        self.refuse(other, saved.parent)

    def test_another_model_is_refused(self, saved):
        other = FIRST.Sequential([FIRST.layers.Input((4,)), FIRST.layers.Dense(4), FIRST.layers.Dense(3)])
        other.compile("adam", "mse")
        self.refuse(other, saved.parent)

    def test_text_in_the_history_neither_reaches_nor_prevents_the_card(self, saved, tmp_path, repo):
        shutil.copytree(saved, tmp_path / "checkpoint")
        rejson(tmp_path / "checkpoint" / "state.json", history={"0": {"loss": "x\n---\n<script>", "note\n# |": 1.5}})
        resumed = small_model(FIRST)
        with contextlib.suppress(ValueError):
            load_repo_checkpoint(resumed, tmp_path)
        train(resumed, pushing(tmp_path, repo), initial_epoch=1, epochs=2)
        card = on_hub(repo)["README.md"].decode()
        assert re.search(r"^\| 1 \|", card, re.MULTILINE)
        assert "<script>" not in card and "\n# |" not in card

    def test_a_folder_without_a_checkpoint_is_refused(self, tmp_path):
        self.refuse(small_model(FIRST), tmp_path, FileNotFoundError)


def last_row(card):
    """The epoch in the last row of a card's table of results."""
    return int(re.findall(r"^\| (\d+) \|", card, re.MULTILINE)[-1])


def assert_one_save(folder):
    """Asserts that model, checkpoint and card in the folder are of one and the same save; returns its epoch."""
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    with np.load(folder / "checkpoint" / "state.npz") as archive:
        for index, weight in enumerate(load(FIRST, folder).get_weights()):
            np.testing.assert_array_equal(archive[f"model.{index}"], weight)
        assert archive["epoch"] == state["epoch"] == last_row((folder / "README.md").read_text())
    return state["epoch"]


class TestSlowUpload:
    @pytest.mark.parametrize("stage", ["info", "lfs", "commit"])
    def test_training_goes_on_and_no_commit_is_torn(self, model, tmp_path, repo, stage):
        callback = pushing(tmp_path, repo, checkpoint=True)
        fault = hub.add_fault(stage, "wait")
        local = []

        def look(epoch):
            local.append((assert_one_save(callback.output_dir), hub.commits(f"user/{repo}")))

        release = FIRST.callbacks.LambdaCallback(on_train_end=lambda logs: fault.release.set())
        train(model, release, callback, at_epoch_end(look), epochs=10)
        assert local == [(epoch, []) for epoch in range(10)]
        assert hub.commits(f"user/{repo}") == ["Training in progress, epoch 0", "End of training"]
        epochs = [assert_one_save(download(tmp_path / str(index), repo, index)) for index in (1, 2)]
        assert epochs == [0, 9]
        assert_same_weights(tmp_path / "2", model)

    def test_the_next_save_after_a_slow_upload_takes_the_newest_state(self, model, tmp_path, repo):
        callback = pushing(tmp_path, repo, checkpoint=True)
        fault = hub.add_fault("lfs", "wait")

        def release(epoch):
            if epoch == 2:
                fault.release.set()
                callback.last_job.result(timeout=60)
            elif epoch > 2:
                callback.last_job.result(timeout=60)

        train(model, callback, at_epoch_end(release), epochs=5)
        messages = hub.commits(f"user/{repo}")
        assert messages[:3] == [f"Training in progress, epoch {epoch}" for epoch in (0, 3, 4)]
        epochs = [assert_one_save(download(tmp_path / str(i), repo, i + 1)) for i in range(len(messages))]
        assert epochs[:3] == [0, 3, 4]

    def test_an_older_state_that_is_being_tried_again_makes_way_for_the_final_one(
        self, model, tmp_path, repo, monkeypatch
    ):
        callback = pushing(tmp_path, repo)
        hub.add_fault("commit", 503)
        waiting = threading.Event()

        def wait_for(event, seconds):
            waiting.set()
            event.wait(60)

        monkeypatch.setattr(kc, "_wait_for", wait_for)
        monkeypatch.setattr(kc, "FIRST_WAIT", 100.0)
        monkeypatch.setattr(kc, "BACKGROUND_SECONDS", 1000.0)
        train(model, callback, at_epoch_end(lambda epoch: waiting.wait(60)))
        assert hub.commits(f"user/{repo}") == ["End of training"]
        assert_same_weights(download(tmp_path / "downloaded", repo), model)


class TestInterrupts:
    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_an_interrupted_fit_leaves_the_folder_whole_and_the_callback_usable(self, model, tmp_path, repo, error):
        callback = pushing(tmp_path, repo, checkpoint=True)
        fault = hub.add_fault("lfs", "wait")

        def fail(epoch):
            if epoch == 1:
                raise error

        with pytest.raises(error):
            train(model, callback, at_epoch_end(fail), epochs=3)
        assert assert_one_save(callback.output_dir) == 1
        fault.release.set()
        callback.last_job.result(timeout=60)
        assert hub.commits(f"user/{repo}") == ["Training in progress, epoch 0"]
        train(model, callback, epochs=1)
        assert callback.training_history == [pytest.approx(callback.training_history[0])]
        assert hub.commits(f"user/{repo}")[-1] in ("Training in progress, epoch 0", "End of training")
        assert assert_one_save(download(tmp_path / "downloaded", repo)) == 0
        assert_same_weights(tmp_path / "downloaded", model)
        assert no_model_leftovers(callback.output_dir)

    def test_an_interrupt_while_an_upload_begins_does_not_hold_up_the_next_one(
        self, model, tmp_path, repo, monkeypatch
    ):
        callback = pushing(tmp_path, repo)

        def interrupt(source, target):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(kc, "_link", interrupt)
            train(model, callback)
        assert isinstance(callback._repo.upload.future.exception(timeout=60), KeyboardInterrupt)
        train(model, callback)
        assert_same_weights(download(tmp_path / "downloaded", repo), model)
        assert no_model_leftovers(callback.output_dir)

    def test_an_error_while_a_save_is_written_leaves_the_one_before(self, model, tmp_path, repo):
        class Interrupting:
            def save_pretrained(self, folder):
                if interrupts:
                    raise KeyboardInterrupt

        interrupts = []
        callback = pushing(tmp_path, repo, tokenizer=Interrupting())
        train(model, callback)
        before = contents(callback.output_dir)
        interrupts.append(True)
        with pytest.raises(KeyboardInterrupt):
            train(model, callback)
        assert contents(callback.output_dir) == before


class Nursery:
    """A process that has imported everything and forks a child for each order it gets."""

    PROGRAM = r'''
import json, os, pathlib, signal, sys, threading
import numpy as np, tensorflow as tf, keras
import keras_callbacks as kc

if not keras.__version__.startswith("3"):
    keras = tf.keras


def train(folder, run, epochs, kill_at=None, leave=False, **constants):
    """Epoch by epoch, all weights are the number of the run and, in the hundredths, the epoch."""
    for name, value in constants.items():
        setattr(kc, name, value)
    model = keras.Sequential([keras.layers.Input((40,)), keras.layers.Dense(30)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    callback = kc.PushToHubCallback(folder, hub_token="hf_write", checkpoint=True)
    callback.set_model(model)
    callback.set_params({"verbose": 0, "epochs": epochs})
    callback.on_train_begin()
    moments = []

    def count(event, args):
        if event.split(".")[0] in ("open", "os", "shutil", "socket", "tempfile"):
            moments.append(event)
            if len(moments) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    for epoch in range(epochs):
        model.set_weights([np.full(w.shape, run + epoch / 100, "float32") for w in model.get_weights()])
        callback.on_epoch_end(epoch, {"loss": 1.0})
    if leave:
        threading.Thread(target=lambda: (threading.main_thread().join(), print('"exiting"', flush=True))).start()
        return
    callback.on_train_end()
    print(json.dumps(len(moments)), flush=True)


print('"ready"', flush=True)
while order := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        train(**json.loads(order))
        break
    print(json.dumps({"status": os.waitpid(child, 0)[1]}), flush=True)
'''

    def __enter__(self):
        environment = {**os.environ, "PYTHONPATH": str(HERE), "STAND_IN_HUB": hub.url}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.guard = threading.Timer(300, self.process.kill)
        self.guard.start()
        assert self.answer() == "ready"
        return self

    def __exit__(self, *error):
        self.guard.cancel()
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def order(self, folder, **arguments):
        self.process.stdin.write(json.dumps({"folder": str(folder), **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def status(self):
        answer = self.answer()
        return answer["status"] if isinstance(answer, dict) else self.status()


class TestKill:
    __test__ = BACKEND == "tensorflow" and hasattr(os, "fork")

    @pytest.fixture(scope="class")
    @classmethod
    def nursery(cls):
        with Nursery() as nursery:
            yield nursery

    def constant(self, weights):
        """The number that all these weights are."""
        values = np.unique(np.concatenate([np.ravel(w) for w in weights]))
        assert len(values) == 1
        return float(values[0])

    def assert_whole(self, folder):
        """Asserts that each file is the whole file of one save."""
        for path in folder.rglob("*.json"):
            if not any(part.startswith(".keras_callbacks-") for part in path.parts):
                json.loads(path.read_text())
        card = folder / "README.md"
        assert not card.exists() or f"huggingface_hub {huggingface_hub.__version__}" in card.read_text()
        config = folder / ("config.json" if FIRST in KERAS3 else "model.keras")
        if config.exists() and (FIRST not in KERAS3 or (folder / "model.weights.h5").exists()):
            self.constant(load(FIRST, folder).get_weights())
        model = FIRST.Sequential([FIRST.layers.Input((40,)), FIRST.layers.Dense(30)])
        model.compile("adam", "mse")
        before = model.get_weights()
        try:
            epoch = load_repo_checkpoint(model, folder)["epoch"]
        except (ValueError, FileNotFoundError):
            for now, then in zip(model.get_weights(), before, strict=True):
                np.testing.assert_array_equal(now, then)
        else:
            assert epoch == round(self.constant(model.get_weights()) % 1 * 100)

    def test_twenty_kills_leave_whole_files_and_the_next_run_finishes(self, nursery, tmp_path, repo):
        folder = tmp_path / repo
        nursery.order(folder, run=0, epochs=4)
        moments = nursery.answer()
        assert nursery.status() == 0
        dice = random.Random(6)
        leftovers = 0
        for run in range(1, 21):
            nursery.order(folder, run=run, epochs=4, kill_at=dice.randint(1, moments - 40))
            assert os.WTERMSIG(nursery.status()) == signal.SIGKILL
            leftovers += not no_model_leftovers(folder)
            self.assert_whole(folder)
        assert leftovers > 0
        nursery.order(folder, run=99, epochs=2)
        assert nursery.status() == 0
        assert no_model_leftovers(folder)
        expected = pytest.approx(99.01)
        assert self.constant(load(FIRST, folder).get_weights()) == expected
        for index in range(1, len(hub.repos[f"user/{repo}"])):
            assert_one_save(download(tmp_path / f"commit {index}", repo, index))
        assert self.constant(load(FIRST, download(tmp_path / "last", repo)).get_weights()) == expected

    def test_a_running_upload_of_two_lfs_files_completes_at_interpreter_exit(self, nursery, tmp_path, repo):
        fault = hub.add_fault("lfs", "wait")
        nursery.order(tmp_path / repo, run=5, epochs=1, leave=True)
        assert fault.reached.wait(60)
        assert nursery.answer() == "exiting"
        fault.release.set()
        assert nursery.status() == 0
        assert sum(hub.is_lfs(name) for name in on_hub(repo)) == 2
        assert assert_one_save(download(tmp_path / "downloaded", repo)) == 0

    def test_interpreter_exit_does_not_wait_for_a_hub_that_is_down(self, nursery, tmp_path, repo):
        hub.add_fault("info", 503, times=10**6)
        nursery.order(tmp_path / repo, run=6, epochs=1, leave=True, FIRST_WAIT=10**5, BACKGROUND_SECONDS=10**6)
        assert nursery.status() == 0
        assert hub.commits(f"user/{repo}") == []

    def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(self, model, tmp_path, repo):
        folder = tmp_path / repo
        callback = pushing(tmp_path, repo)
        dead = folder / ".keras_callbacks-dead" / "staged"
        dead.mkdir(parents=True)
        (dead / "model.weights.h5").write_bytes(b"half")
        living = kc._Workspace(folder)
        (living.staged / "config.json").write_text("{}")
        train(model, callback)
        assert list(folder.glob(".keras_callbacks-*")) == [living.folder]
        assert (living.staged / "config.json").exists()
        living.close()

    def test_an_upload_that_ends_while_a_save_begins_does_not_break_it(self, tmp_path):
        finished = []

        def save_often():
            for _ in range(100):
                kc._Workspace(tmp_path).close()
            finished.append(True)

        threads = [threading.Thread(target=save_often, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert finished == [True] * 4
        assert no_model_leftovers(tmp_path)


class TestSequences:
    __test__ = has("hypothesis")
    numbers = itertools.count()

    def promises_hold(self, model, steps, recovers_last):
        """Plays one training against a Hub that does as the steps say; checks the promises after each."""
        hub.reset()
        with tempfile.TemporaryDirectory() as parent:
            parent, name = pathlib.Path(parent), f"sequence-{next(self.numbers)}"
            callback = pushing(parent, name, checkpoint=True)
            drive(callback, model)
            slow = failing = None
            newest = -1

            def recover():
                nonlocal slow, failing
                for fault in hub.faults:
                    fault.times = 0
                    fault.release.set()
                slow = failing = None
                if callback.last_job is not None:
                    callback.last_job.exception(timeout=60)

            for step in [*steps, *(["recover", "save"] if recovers_last else [])]:
                if step == "save":
                    newest += 1
                    model.set_weights([np.full_like(weight, newest) for weight in model.get_weights()])
                    idle = callback.last_job is None or callback.last_job.done()
                    callback.on_epoch_end(newest, {"loss": 1.0})
                    assert assert_one_save(callback.output_dir) == newest
                    if idle and not (slow or failing):
                        callback.last_job.result(timeout=60)
                        assert assert_one_save(download(parent / "pushed", name)) == newest
                elif step == "slow":
                    slow = slow or hub.add_fault("lfs", "wait", times=1)
                elif step == "fail":
                    failing = failing or hub.add_fault("info", 503, times=10**6)
                else:
                    recover()
            if slow:
                slow.release.set()
            if newest < 0:
                return
            if failing:
                with pytest.warns(UserWarning, match="could not be pushed"):
                    callback.on_train_end()
                assert callback.last_job.exception() is not None
            else:
                callback.on_train_end()
                assert assert_one_save(download(parent / "final", name)) == newest
            assert assert_one_save(callback.output_dir) == newest
            assert_same_weights(callback.output_dir, model)
            pushed = [
                assert_one_save(download(parent / str(index), name, index))
                for index in range(1, len(hub.repos[f"user/{name}"]))
            ]
            assert pushed == sorted(pushed)
            assert no_model_leftovers(callback.output_dir)

    def test_no_sequence_of_saves_and_faults_breaks_a_promise(self, model, monkeypatch):
        import hypothesis
        from hypothesis import strategies

        monkeypatch.setattr(kc, "BACKGROUND_SECONDS", 0.05)
        monkeypatch.setattr(kc, "FINAL_SECONDS", 0.05)
        step = strategies.sampled_from(["save", "save", "slow", "fail", "recover"])

        @hypothesis.settings(deadline=None, max_examples=15, database=None)
        @hypothesis.given(strategies.lists(step, min_size=1, max_size=8), strategies.booleans())
        def play(steps, recovers_last):
            self.promises_hold(model, steps, recovers_last)

        play()


LENGTHS = [(5, 3, 4), (7, 7, 2), (4,)]  # of the examples in each batch: three widths, a last batch of one


def padded(rows, padding):
    """One array from rows of different lengths, each padded at the end of its first axis."""
    longest = max(map(len, rows))
    whole = np.full((len(rows), longest, *rows[0].shape[1:]), padding, rows[0].dtype)
    for target, row in zip(whole, rows):
        target[: len(row)] = row
    return whole


def one_by_one(batches):
    """The examples of the batches, each as a batch of one, as wide as the batch it comes from."""
    return [
        tf.nest.map_structure(lambda column: column[index : index + 1], batch)
        for batch in batches
        for index in range(len(tf.nest.flatten(batch)[0]))
    ]


def token_batches(side="right", vocabulary=40):
    """Batches of token ids with their attention masks, padded with 0 on one side."""
    rng = np.random.default_rng(3)
    batches = []
    for lengths in LENGTHS:
        spans = np.arange(max(lengths)) < np.array(lengths)[:, None]
        mask = (spans if side == "right" else spans[:, ::-1]).astype("int32")
        ids = rng.integers(5, vocabulary, mask.shape, "int32") * mask
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def feature_batches(name, shape):
    """Batches of 3, 3 and 1 images or spectrograms, in a column of this name."""
    rng = np.random.default_rng(4)
    return [{name: rng.normal(size=(len(lengths), *shape)).astype("float32")} for lengths in LENGTHS]


def with_labels(batches, kind, name="labels", classes=3):
    """The batches with a column of labels: one class for each example, or for each token, padded with -100."""
    rng = np.random.default_rng(5)
    for batch in batches:
        like = next(iter(batch.values()))
        labels = rng.integers(0, classes, like.shape[:1] if kind == "example" else like.shape, "int64")
        if kind == "token":
            labels[batch["attention_mask"] == 0] = -100
        batch[name] = labels
    return batches


def labels_apart(batches):
    """The same batches as pairs of inputs and labels."""
    return [({name: part for name, part in batch.items() if name != "labels"}, batch["labels"]) for batch in batches]


def as_pipeline(batches):
    """A tf.data pipeline of these batches, whose widths differ."""
    spec = tf.nest.map_structure(lambda c: tf.TensorSpec([None] * c.ndim, c.dtype), batches[0])
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)


def tiny(name, **options):
    """A small transformers model of random weights, large enough ones for its outputs to differ."""
    import transformers
    from tf_keras.utils import set_random_seed

    sizes = {
        "Bert": dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        "GPT2": dict(n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        "T5": dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0),
        "ViT": dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        ),
    }
    speech = dict(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        pad_token_id=0,
        eos_token_id=2,
    )
    sizes["Bart"] = dict(speech, max_position_embeddings=32, bos_token_id=1, forced_eos_token_id=None)
    sizes["Whisper"] = dict(
        speech,
        max_source_positions=6,
        max_target_positions=32,
        num_mel_bins=4,
        bos_token_id=1,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    family = next(family for family in sizes if name.startswith(f"TF{family}"))
    words = {} if family == "ViT" else {"vocab_size": 40}
    set_random_seed(11)
    config = getattr(transformers, f"{family}Config")(**sizes[family] | words | options)
    model = getattr(transformers, name)(config)
    model.build_in_name_scope()
    rng = np.random.default_rng(6)
    model.set_weights([rng.normal(size=weight.shape, scale=0.4) for weight in model.get_weights()])
    return model


def tiny_captioner():
    """A small model that generates text from images: ViT as the encoder, GPT2 as the decoder."""
    import transformers

    encoder = tiny("TFViTModel")
    decoder = tiny("TFGPT2LMHeadModel", add_cross_attention=True, is_decoder=True)
    model = transformers.TFVisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    return model


@pytest.mark.filterwarnings("ignore:The initializer .* is unseeded and being called multiple times:UserWarning")
class TestTransformers:
    __test__ = has("transformers", "tf_keras", "datasets", "rouge_score")

    ENDS = list(range(3, 40, 4))  # many tokens end a sequence, so that the lengths differ

    PREDICTING = {
        "sequence classification": ("TFBertForSequenceClassification", lambda: with_labels(token_batches(), "example")),
        "token classification": ("TFBertForTokenClassification", lambda: with_labels(token_batches(), "token")),
        "masked language": ("TFBertForMaskedLM", lambda: with_labels(token_batches(), "token", classes=40)),
        "labels in a tuple": (
            "TFBertForTokenClassification",
            lambda: labels_apart(with_labels(token_batches(), "token")),
        ),
        "GPT2 padded left": ("TFGPT2LMHeadModel", lambda: with_labels(token_batches("left"), "token", classes=40)),
        "images": (
            "TFViTForImageClassification",
            lambda: with_labels(feature_batches("pixel_values", (3, 8, 8)), "example"),
        ),
    }

    @pytest.mark.parametrize("kind", PREDICTING)
    def test_predictions_equal_those_of_one_example_at_a_time(self, kind):
        name, batches = self.PREDICTING[kind][0], self.PREDICTING[kind][1]()
        model = tiny(name, **{} if "LM" in name else {"num_labels": 3})
        predictions, labels = evaluate(model, as_pipeline(batches))
        pairs = [x if isinstance(x, tuple) else (x, x["labels"]) for x in one_by_one(batches)]
        rows = [np.asarray(model({n: c for n, c in x.items() if n != "labels"}).logits)[0] for x, _ in pairs]
        expected = np.stack(rows) if rows[0].ndim == 1 else padded(rows, -100)
        expected_labels = [label[0] for _, label in pairs]
        expected_labels = padded(expected_labels, -100) if expected_labels[0].ndim else np.array(expected_labels)
        np.testing.assert_allclose(predictions, expected, atol=1e-4)
        np.testing.assert_array_equal(labels, expected_labels)
        assert (predictions.dtype, labels.dtype) == (np.float32, np.int64)

    def test_question_answering_gives_both_logits_and_finds_both_positions(self):
        batches = with_labels(with_labels(token_batches(), "example", "start_positions"), "example", "end_positions")
        model = tiny("TFBertForQuestionAnswering")
        predictions, labels = evaluate(model, as_pipeline(batches))
        columns = ("input_ids", "attention_mask")
        rows = [model({name: x[name] for name in columns}) for x in one_by_one(batches)]
        assert list(predictions) == ["start_logits", "end_logits"]
        for name, received in predictions.items():
            np.testing.assert_allclose(received, padded([row[name].numpy()[0] for row in rows], -100), atol=1e-4)
        for name, received in labels.items():
            np.testing.assert_array_equal(received, np.concatenate([batch[name] for batch in batches]))
        assert list(labels) == ["start_positions", "end_positions"]

    def test_hidden_states_of_all_layers_arrive_as_they_are_nested(self):
        batches = token_batches()
        model = tiny("TFBertModel", output_hidden_states=True)
        predictions, _ = evaluate(model, as_pipeline([(x, x["input_ids"]) for x in batches]))
        rows = [model(x) for x in one_by_one(batches)]
        assert list(predictions) == ["last_hidden_state", "pooler_output", "hidden_states"]
        for layer, received in enumerate(predictions["hidden_states"]):
            expected = padded([row.hidden_states[layer].numpy()[0] for row in rows], -100)
            np.testing.assert_allclose(received, expected, atol=1e-4)

    @pytest.mark.parametrize("family, arrange", [("T5", list), ("T5", labels_apart), ("Bart", labels_apart)])
    def test_an_encoder_decoder_makes_its_decoder_inputs_from_the_labels(self, family, arrange):
        batches = with_labels(token_batches(), "token", classes=40)
        model = tiny(f"TF{family}ForConditionalGeneration")
        predictions, labels = evaluate(model, as_pipeline(arrange(batches)), output_cols=["logits"])
        rows = [model(**x).logits.numpy()[0] for x in one_by_one(batches)]
        np.testing.assert_allclose(predictions, padded(rows, -100), atol=1e-4)
        np.testing.assert_array_equal(labels, padded([row for batch in batches for row in batch["labels"]], -100))

    GENERATING = {
        "GPT2 padded left": (lambda: tiny("TFGPT2LMHeadModel"), lambda: token_batches("left")),
        "T5": (lambda: tiny("TFT5ForConditionalGeneration"), token_batches),
        "BART": (lambda: tiny("TFBartForConditionalGeneration", forced_bos_token_id=None), token_batches),
        "speech": (
            lambda: tiny("TFWhisperForConditionalGeneration"),
            lambda: feature_batches("input_features", (4, 12)),
        ),
        "images": (tiny_captioner, lambda: feature_batches("pixel_values", (3, 8, 8))),
    }

    @pytest.mark.parametrize("kind", GENERATING)
    def test_generated_tokens_equal_those_of_one_example_at_a_time(self, kind):
        make, batches = self.GENERATING[kind][0], self.GENERATING[kind][1]()
        model, options = make(), {"max_new_tokens": 8, "eos_token_id": self.ENDS}
        rows = [model.generate(**x, **options).numpy()[0] for x in one_by_one(batches)]
        for batch in batches:
            batch["labels"] = np.full((len(next(iter(batch.values()))), 2), 7)
        predictions, labels = evaluate(model, as_pipeline(batches), predict_with_generate=True, generate_kwargs=options)
        assert len({len(row) for row in rows}) > 1
        np.testing.assert_array_equal(predictions, padded(rows, model.config.pad_token_id))
        assert predictions.dtype == rows[0].dtype
        assert labels.shape == (7, 2)

    def test_sequences_and_scores_of_a_generation_arrive_together(self):
        model, batches = tiny("TFT5ForConditionalGeneration"), token_batches()
        options = dict(max_new_tokens=8, eos_token_id=self.ENDS, return_dict_in_generate=True, output_scores=True)
        rows = [model.generate(**x, **options) for x in one_by_one(batches)]
        data = as_pipeline([(batch, np.zeros(len(batch["input_ids"]))) for batch in batches])
        predictions, _ = evaluate(model, data, predict_with_generate=True, generate_kwargs=options)
        np.testing.assert_array_equal(predictions["sequences"], padded([row.sequences.numpy()[0] for row in rows], 0))
        assert len(predictions["scores"]) == max(len(row.scores) for row in rows)
        for index, row in enumerate(rows):
            received = [step[index] for step in predictions["scores"]][: len(row.scores)]
            np.testing.assert_allclose(received, [step.numpy()[0] for step in row.scores], atol=1e-4)
        ended = len(rows[-1].scores)  # the last batch holds this example alone
        assert all((step[-1] == -100).all() for step in predictions["scores"][ended:])

    def test_xla_generates_what_eager_does_with_one_compilation_and_the_weights_of_now(self):
        model, received, traces = tiny("TFT5ForConditionalGeneration"), [], []
        ids = np.random.default_rng(8).integers(5, 40, (7, 5), "int32")  # batches of 3, 3 and 1
        inputs, options = {"input_ids": ids, "attention_mask": np.ones_like(ids)}, {"max_length": 6}
        generate = model.generate
        model.generate = lambda *args, **kwargs: traces.append(1) or generate(*args, **kwargs)
        callback = KerasMetricCallback(
            lambda predictions, labels: received.append(predictions) or {},
            (inputs, np.zeros(7)),
            batch_size=3,
            predict_with_generate=True,
            use_xla_generation=True,
            generate_kwargs=options,
        )
        callback.set_model(model)
        callback.on_epoch_end(0)
        before = generate(**inputs, **options).numpy()
        model.set_weights([weight[..., ::-1] for weight in model.get_weights()])
        callback.on_epoch_end(1)
        after = generate(**inputs, **options).numpy()
        assert len(traces) == 1
        assert not np.array_equal(before, after)
        np.testing.assert_array_equal(received, [before, after])

    @pytest.mark.parametrize("kind", ["GPT2 padded left", "BART", "speech"])
    def test_xla_generates_what_eager_does_whether_or_not_the_model_needs_autograph(self, kind):
        make, batches = self.GENERATING[kind]
        model, (batch, *_), options = make(), batches(), {"max_new_tokens": 4}
        data, xla = (batch, np.zeros(3)), {"predict_with_generate": True, "use_xla_generation": True}
        predictions, _ = evaluate(model, data, batch_size=2, generate_kwargs=options, **xla)
        np.testing.assert_array_equal(predictions, model.generate(**batch, **options).numpy())

    @pytest.fixture
    def lines(self):
        """Lines of scikit-learn's descriptions of two data sets, and which one each is about."""
        from sklearn.datasets import load_breast_cancer, load_iris

        pairs = []
        for topic, load_data in (("flowers", load_iris), ("medicine", load_breast_cancer)):
            text = [line.strip() for line in load_data().DESCR.splitlines()]
            pairs += [(line, topic) for line in text if len(line.split()) > 4][:24]
        random.Random(0).shuffle(pairs)
        return pairs

    @pytest.fixture
    def tokenizer(self, lines):
        import tokenizers
        import transformers

        words = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
        words.normalizer = tokenizers.normalizers.Lowercase()
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.decoder = tokenizers.decoders.WordPiece()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
        words.train_from_iterator([part for pair in lines for part in pair], trainer)
        words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=24,
        )

    @pytest.mark.parametrize("pipeline", ["prepare_tf_dataset", "to_tf_dataset", "to_tf_dataset with label_cols"])
    def test_pipelines_of_the_datasets_library_serve_as_they_come(self, pipeline, lines, tokenizer):
        import datasets
        import transformers

        encoded = tokenizer([line for line, _ in lines[:7]], truncation=True)
        topics = [int(topic == "medicine") for _, topic in lines[:7]]
        data = datasets.Dataset.from_dict({**encoded, "labels": topics})
        model = tiny("TFBertForSequenceClassification", vocab_size=len(tokenizer), num_labels=2)
        collator = transformers.DataCollatorWithPadding(tokenizer, return_tensors="np")
        options = dict(batch_size=3, shuffle=False, collate_fn=collator)
        if pipeline == "prepare_tf_dataset":
            dataset = model.prepare_tf_dataset(data, **options)
        elif pipeline == "to_tf_dataset":
            dataset = data.to_tf_dataset(columns=data.column_names, **options)
        else:
            dataset = data.to_tf_dataset(columns=list(encoded), label_cols="labels", **options)
        predictions, labels = evaluate(model, dataset)
        expected = [model(tf.constant([ids])).logits.numpy()[0] for ids in encoded["input_ids"]]
        np.testing.assert_allclose(predictions, expected, atol=1e-4)
        np.testing.assert_array_equal(labels, topics)

    def test_a_t5_is_trained_measured_pushed_and_loads_with_its_tokenizer(self, lines, tokenizer, tmp_path):
        import datasets
        import transformers
        from tf_keras.optimizers import Adam

        texts, topics = map(list, zip(*lines))
        encoded = tokenizer(texts, text_target=topics, truncation=True)
        model = tiny("TFT5ForConditionalGeneration", vocab_size=len(tokenizer), dropout_rate=0.0)
        model.set_weights([weight / 4 for weight in model.get_weights()])
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, model, return_tensors="np")
        rows = datasets.Dataset.from_dict(dict(encoded))
        training, evaluation = rows.select(range(32)), rows.select(range(32, len(rows)))
        decode = functools.partial(tokenizer.batch_decode, skip_special_tokens=True)

        def exact_match(predictions, labels):
            labels = np.where(labels == -100, tokenizer.pad_token_id, labels)
            return {"exact_match": np.mean([a == b for a, b in zip(decode(predictions), decode(labels))])}

        measure = KerasMetricCallback(
            exact_match,
            model.prepare_tf_dataset(evaluation, batch_size=5, shuffle=False, collate_fn=collator),
            predict_with_generate=True,
            generate_kwargs={"max_new_tokens": 4},
        )
        push = pushing(tmp_path, "reader", tokenizer=tokenizer, tasks="text2text-generation")
        model.compile(Adam(0.01))
        history = model.fit(
            model.prepare_tf_dataset(training, batch_size=8, collate_fn=collator),
            epochs=3,
            verbose=0,
            callbacks=[measure, push],
        ).history

        loaded_tokenizer = transformers.AutoTokenizer.from_pretrained("user/reader", cache_dir=tmp_path / "cache")
        loaded = transformers.TFT5ForConditionalGeneration.from_pretrained("user/reader", cache_dir=tmp_path / "cache")
        answers = []
        for text in texts[32:]:
            inputs = loaded_tokenizer(text, truncation=True, return_tensors="tf")
            tokens = loaded.generate(**inputs, max_new_tokens=4)
            np.testing.assert_array_equal(tokens, model.generate(**inputs, max_new_tokens=4))
            answers += loaded_tokenizer.batch_decode(tokens, skip_special_tokens=True)
        assert len(history["exact_match"]) == 3
        assert history["exact_match"][-1] == np.mean([a == b for a, b in zip(answers, topics[32:])]) > 0
        np.testing.assert_array_equal(
            loaded(**inputs, labels=inputs["input_ids"]).logits, model(**inputs, labels=inputs["input_ids"]).logits
        )

    def test_the_rouge_recipe_of_the_readme_runs_as_it_stands(self, lines, tokenizer, tmp_path):
        import datasets
        import transformers

        texts, topics = map(list, zip(*lines))
        encoded = dict(tokenizer(texts, text_target=topics, truncation=True, padding="max_length", max_length=16))
        model = tiny("TFT5ForConditionalGeneration", vocab_size=len(tokenizer))
        model.compile("adam")
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, model, return_tensors="np")
        rows = datasets.Dataset.from_dict(encoded).select(range(12))
        batches = model.prepare_tf_dataset(rows, batch_size=5, shuffle=False, drop_remainder=False, collate_fn=collator)
        names = run_readme_block(
            "RougeScorer", tmp_path, model=model, tokenizer=tokenizer, train_dataset=batches, eval_dataset=batches
        )
        scores = {name: model.history.history[name][0] for name in ("rouge1", "rougeL")}
        inputs = {name: np.array(encoded[name])[:12] for name in ("input_ids", "attention_mask")}
        decoded = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=16), skip_special_tokens=True)
        expected = [names["scorer"].score(topic, text) for topic, text in zip(topics, decoded)]
        for name, score in scores.items():
            assert score == pytest.approx(100 * np.mean([each[name].fmeasure for each in expected]))

    @pytest.mark.parametrize("optimizer", ["Adam", "AdamWeightDecay"])
    def test_training_resumes_bitwise(self, optimizer, tmp_path):
        import transformers
        from tf_keras.optimizers import Adam

        inputs = {"input_ids": np.random.default_rng(1).integers(5, 40, (16, 6), "int32")}

        def make():
            dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model = tiny("TFBertForSequenceClassification", num_labels=2, **dropout)
            legacy, _ = transformers.create_optimizer(0.01, 16, num_warmup_steps=4, weight_decay_rate=0.1)
            model.compile(Adam(0.01) if optimizer == "Adam" else legacy)
            assert type(model.optimizer).__name__ == optimizer
            return model

        def fit(model, callbacks=(), **epochs):
            labels = inputs["input_ids"].sum(1) % 2
            model.fit(inputs, labels, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks, **epochs)

        whole, half, resumed = make(), make(), make()
        fit(whole, epochs=4)
        fit(half, [pushing(tmp_path, optimizer, checkpoint=True)], epochs=2)
        resumed.set_weights([0 * weight for weight in resumed.get_weights()])
        last = load_repo_checkpoint(resumed, f"user/{optimizer}", token=WRITE)
        fit(resumed, initial_epoch=last["epoch"] + 1, epochs=4)
        assert last == {"epoch": 1}
        for left, right in zip(state_of(resumed), state_of(whole), strict=True):
            np.testing.assert_array_equal(left, right)


def normalised_model(keras):
    """small_model after a batch normalisation, whose averages each replica has of its own while training."""
    model = small_model(keras)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.BatchNormalization(momentum=0.5), *model.layers])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def train_distributed(keras, strategy, folder, name, epochs=2, callbacks=(), **options):
    """Trains with both callbacks on two replicas; writes what metric_fn received and the history to `folder`."""
    assert strategy.num_replicas_in_sync == 2
    received = []

    def metric_fn(predictions, labels):
        received.append((predictions, labels))
        return {"surety": predictions.max(-1).mean()}

    with strategy.scope():
        model = normalised_model(keras)
    measure = KerasMetricCallback(metric_fn, tf.data.Dataset.from_tensor_slices((X, Y)).batch(8))
    push = pushing(folder, "out", hub_model_id=name, **options)
    data = tf.data.Dataset.from_tensor_slices((X[:16], Y[:16])).batch(8)
    fit = model.fit(data, epochs=epochs, verbose=0, callbacks=[measure, *callbacks, push])
    np.savez(folder / "received.npz", predictions=received[-1][0], labels=received[-1][1])
    (folder / "history.json").write_text(json.dumps({n: list(map(float, v)) for n, v in fit.history.items()}))


def train_as_worker(lineage, strategy, folder):
    """Trains as the worker that TF_CONFIG names; EarlyStopping sees the metric."""
    keras = lineages()[lineage]
    folder = pathlib.Path(folder) / str(json.loads(os.environ["TF_CONFIG"])["task"]["index"])
    stop = keras.callbacks.EarlyStopping("surety", mode="min", min_delta=10, patience=2)  # after the third epoch
    train_distributed(keras, strategy, folder, "workers", epochs=5, callbacks=[stop], checkpoint=True)


# Devices and workers have to be there before TensorFlow makes its first tensor, as this module does.
TWO_DEVICES = """
import pathlib, numpy, tensorflow as tf
processor = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
import test_keras_callbacks as tests
keras, folder = tests.lineages()[{lineage}], pathlib.Path({folder!r})
"""
RESUMING_IN_ORDER = """
def make():
    with strategy.scope():
        return tests.small_model(keras)

whole, half, resumed = make(), make(), make()
data = tf.data.Dataset.from_tensor_slices((tests.X[:16], tests.Y[:16])).batch(8)
whole.fit(data, epochs=4, verbose=0)
half.fit(data, epochs=2, verbose=0, callbacks=[tests.pushing(folder, "half", checkpoint=True)])
resumed.set_weights([0 * weight for weight in resumed.get_weights()])
last = tests.load_repo_checkpoint(resumed, "user/half", token=tests.WRITE)
resumed.fit(data, initial_epoch=last["epoch"] + 1, epochs=4, verbose=0)
numpy.savez(folder / "whole.npz", *tests.state_of(whole))
numpy.savez(folder / "resumed.npz", *tests.state_of(resumed))
"""
TWO_WORKERS = """
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import test_keras_callbacks as tests
tests.train_as_worker({lineage}, strategy, {folder!r})
"""


class TestDistribution:
    __test__ = BACKEND == "tensorflow"

    def test_two_replicas_measure_and_push_what_one_device_predicts(self, keras, tmp_path):
        code = TWO_DEVICES.format(lineage=lineages().index(keras), folder=str(tmp_path))
        children((code + 'tests.train_distributed(keras, strategy, folder, "mirrored")', {}))
        loaded = load(keras, download(tmp_path / "downloaded", "mirrored"))
        received = np.load(tmp_path / "received.npz")
        np.testing.assert_allclose(received["predictions"], loaded.predict(X, verbose=0), atol=1e-6)
        np.testing.assert_array_equal(received["labels"], Y)

    def test_training_on_two_devices_resumes_bitwise(self, keras, tmp_path):
        code = TWO_DEVICES.format(lineage=lineages().index(keras), folder=str(tmp_path))
        children((code + RESUMING_IN_ORDER, {}))
        with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "resumed.npz") as resumed:
            for left, right in zip(resumed.values(), whole.values(), strict=True):
                np.testing.assert_array_equal(left, right)


class TestSeveralWorkers:
    __test__ = BACKEND == "tensorflow" and len(lineages()) > len(KERAS3)

    def test_all_measure_the_same_and_the_chief_alone_writes_and_commits(self, tmp_path):
        lineage = next(index for index, package in enumerate(lineages()) if package not in KERAS3)
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
        for index, listener in enumerate(listeners):
            listener.close()
            (tmp_path / str(index) / "scratch").mkdir(parents=True)
        code = TWO_WORKERS.format(lineage=lineage, folder=str(tmp_path))
        tasks = [{"type": "worker", "index": index} for index in range(2)]
        environments = [
            {
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
                "TMPDIR": str(tmp_path / str(task["index"]) / "scratch"),
            }
            for task in tasks
        ]
        children(*((code, environment) for environment in environments))
        chief, other = tmp_path / "0", tmp_path / "1"
        histories = [json.loads((folder / "history.json").read_text()) for folder in (chief, other)]
        loaded = load(lineages()[lineage], download(tmp_path / "downloaded", "workers"))
        assert histories[0] == histories[1]
        assert len(histories[0]["surety"]) == 3
        for folder in (chief, other):
            received = np.load(folder / "received.npz")
            np.testing.assert_allclose(received["predictions"], loaded.predict(X, verbose=0), atol=1e-6)
        assert list((other / "out").iterdir()) == []
        assert no_model_leftovers(other / "scratch")
        assert {path.name for path in (chief / "out").iterdir()} == {"README.md", "checkpoint", "model.keras"}
        assert len(hub.commits("user/workers")) == len([stage for stage, _ in hub.requests if stage == "commit"])
        assert load_repo_checkpoint(loaded, "user/workers", token=WRITE) == {"epoch": 2}


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed, but will be ignored:UserWarning")
class TestKerasHub:
    __test__ = has("keras_hub")

    TEXTS = ["ab cd", "e", "fgh ab a", "j", "ab ab", "cab fad", "hid"]
    WORDS = ["<s>", "<pad>", "</s>", "<|endoftext|>", "<unk>", "<mask>", *"Ġabcdefghij", "ab"]
    SIZES = dict(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, max_sequence_length=16, dropout=0.0)

    def language_model(self, kind, preprocess=True):
        """A small GPT2 or BART of random weights, which generates greedily."""
        import keras
        from keras_hub import models, tokenizers

        keras.utils.set_random_seed(2)
        vocabulary = {word: index for index, word in enumerate(self.WORDS)}
        tokenizer = getattr(tokenizers, f"{kind}Tokenizer")(vocabulary=vocabulary, merges=["a b"])
        backbone = getattr(models, f"{kind}Backbone")(vocabulary_size=len(self.WORDS), **self.SIZES)
        if kind == "GPT2":
            preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=12)
            make = models.GPT2CausalLM
        else:
            lengths = dict(encoder_sequence_length=10, decoder_sequence_length=12)
            preprocessor = models.BartSeq2SeqLMPreprocessor(tokenizer, **lengths)
            make = models.BartSeq2SeqLM
        model = make(backbone, preprocessor=preprocessor if preprocess else None)
        seed, scale = (0, 0.5) if kind == "GPT2" else (11, 2.0)  # weights that give different texts
        rng = np.random.default_rng(seed)
        model.set_weights([rng.normal(size=weight.shape, scale=scale) for weight in model.get_weights()])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, weighted_metrics=[], sampler="greedy", jit_compile=False)
        model.preprocessing = preprocessor
        return model

    def classifier(self, preprocess=True):
        """A small BERT with three classes."""
        import keras
        from keras_hub import models, tokenizers

        keras.utils.set_random_seed(2)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
        tokenizer = tokenizers.BertTokenizer(vocabulary=words, lowercase=True)
        preprocessor = models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
        backbone = models.BertBackbone(vocabulary_size=len(words), **self.SIZES)
        model = models.BertTextClassifier(backbone, 3, preprocessor=preprocessor if preprocess else None, dropout=0.0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
        model.preprocessing = preprocessor
        return model

    @pytest.mark.parametrize("kind", ["GPT2", "Bart"])
    def test_text_in_gives_the_text_of_one_example_at_a_time(self, kind):
        model = self.language_model(kind)
        data = tf.data.Dataset.from_tensor_slices((self.TEXTS, self.TEXTS)).batch(3)
        predictions, labels = evaluate(model, data, predict_with_generate=True, generate_kwargs={"max_length": 9})
        expected = [model.generate(text, max_length=9) for text in self.TEXTS]
        assert len(set(expected)) > 3
        assert predictions.tolist() == expected
        assert labels.tolist() == self.TEXTS

    def test_named_texts_go_to_the_model_without_the_labels(self):
        model = self.language_model("Bart")
        columns = {"encoder_text": self.TEXTS, "decoder_text": self.TEXTS[::-1], "summary": self.TEXTS}
        data = tf.data.Dataset.from_tensor_slices(columns).batch(3)
        predictions, _ = evaluate(
            model, data, label_cols="summary", predict_with_generate=True, generate_kwargs={"max_length": 9}
        )
        pairs = zip(self.TEXTS, self.TEXTS[::-1])
        expected = [
            model.generate({"encoder_text": [text], "decoder_text": [start]}, max_length=9)[0] for text, start in pairs
        ]
        assert predictions.tolist() == expected

    @pytest.mark.parametrize("kind", ["GPT2", "Bart"])
    def test_without_a_preprocessor_tokens_go_in_and_come_out_in_a_dict(self, kind):
        model = self.language_model(kind, preprocess=False)
        inputs = {name: np.array(c) for name, c in model.preprocessing.generate_preprocess(self.TEXTS).items()}
        options = {"stop_token_ids": [10, 11, 12]}
        predictions, _ = evaluate(
            model, (inputs, np.zeros(7)), batch_size=3, predict_with_generate=True, generate_kwargs=options
        )
        rows = [model.generate({n: c[i : i + 1] for n, c in inputs.items()}, **options) for i in range(7)]
        assert predictions.keys() == rows[0].keys()
        *_, tokens, mask = sorted(predictions, key=lambda name: name.endswith("mask"))  # tokens count where it is true
        expected = {name: np.concatenate([row[name] for row in rows]) for name in predictions}
        assert not expected[mask].all()
        np.testing.assert_array_equal(predictions[mask], expected[mask])
        np.testing.assert_array_equal(predictions[tokens][expected[mask]], expected[tokens][expected[mask]])
        assert {name: c.dtype for name, c in predictions.items()} == {name: c.dtype for name, c in expected.items()}

    def test_a_classifier_of_text_measures_what_it_predicts(self):
        model = self.classifier()
        data = tf.data.Dataset.from_tensor_slices((self.TEXTS, Y[:7])).batch(3)
        predictions, labels = evaluate(model, data)
        np.testing.assert_allclose(predictions, model.predict(np.array(self.TEXTS), verbose=0), atol=1e-6)
        np.testing.assert_array_equal(labels, Y[:7])
        assert predictions.dtype == np.float32

    def test_a_language_model_is_trained_measured_pushed_and_loads_with_its_preprocessor(self, tmp_path):
        import keras_hub

        model, received = self.language_model("GPT2"), []
        measure = KerasMetricCallback(
            lambda predictions, labels: received.append(predictions) or {"exact": np.mean(predictions == labels)},
            tf.data.Dataset.from_tensor_slices((self.TEXTS, self.TEXTS)).batch(3),
            predict_with_generate=True,
            generate_kwargs={"max_length": 9},
        )
        data = tf.data.Dataset.from_tensor_slices(self.TEXTS).batch(4)
        history = model.fit(data, epochs=2, verbose=0, callbacks=[measure, pushing(tmp_path, "writer")]).history
        loaded = keras_hub.models.GPT2CausalLM.from_preset("hf://user/writer")
        loaded.compile(sampler="greedy", jit_compile=False)
        assert len(history["exact"]) == 2
        assert loaded.generate(self.TEXTS, max_length=9) == received[-1].tolist()

    def test_an_encoder_decoder_is_pushed_and_loads_with_its_tokenizer(self, tmp_path):
        import keras_hub

        model, push = self.language_model("Bart"), pushing(tmp_path, "translator")
        push.set_model(model)
        push.on_train_begin()
        push.on_train_end()
        loaded = keras_hub.models.BartSeq2SeqLM.from_preset("hf://user/translator")
        loaded.compile(sampler="greedy", jit_compile=False)
        loaded.preprocessor.encoder_sequence_length = 10  # KerasHub 0.32 does not save this length
        assert loaded.generate(self.TEXTS, max_length=9) == model.generate(self.TEXTS, max_length=9)

    def test_xla_generation_warns_of_the_switch_of_kerashub(self, caplog):
        model = self.language_model("GPT2")
        data = tf.data.Dataset.from_tensor_slices((self.TEXTS, self.TEXTS)).batch(7)
        predictions, _ = evaluate(model, data, predict_with_generate=True, use_xla_generation=True)
        assert predictions.tolist() == model.generate(self.TEXTS)
        assert "jit_compile=True" in caplog.text

    def test_a_classifier_is_pushed_and_loads_with_its_preprocessor(self, tmp_path):
        import keras_hub

        model = self.classifier()
        data = tf.data.Dataset.from_tensor_slices((self.TEXTS, Y[:7])).batch(3)
        model.fit(data, verbose=0, callbacks=[pushing(tmp_path, "judge")])
        loaded = keras_hub.models.BertTextClassifier.from_preset("hf://user/judge")
        texts = np.array(self.TEXTS)
        np.testing.assert_array_equal(loaded.predict(texts, verbose=0), model.predict(texts, verbose=0))

    def test_training_resumes_bitwise(self, tmp_path):
        whole, half, resumed = (self.classifier(preprocess=False) for _ in range(3))
        tokens = {name: np.array(column) for name, column in whole.preprocessing(self.TEXTS).items()}
        options = dict(batch_size=3, shuffle=False, verbose=0)
        whole.fit(tokens, Y[:7], epochs=4, **options)
        half.fit(tokens, Y[:7], epochs=2, callbacks=[pushing(tmp_path, "student", checkpoint=True)], **options)
        resumed.set_weights([0 * weight for weight in resumed.get_weights()])
        last = load_repo_checkpoint(resumed, "user/student", token=WRITE)
        resumed.fit(tokens, Y[:7], initial_epoch=last["epoch"] + 1, epochs=4, **options)
        for left, right in zip(state_of(resumed), state_of(whole), strict=True):
            np.testing.assert_array_equal(left, right)


# Host devices are counted when JAX starts.
TWO_HOST_DEVICES = """
import pathlib, keras
keras.distribution.set_distribution(keras.distribution.DataParallel())
import test_keras_callbacks as tests
tests.train_in_parallel(pathlib.Path({folder!r}), "parallel")
"""
TWO_PROCESSES = """
import pathlib, keras
keras.distribution.initialize({addresses!r}, 2, {process})
keras.distribution.set_distribution(keras.distribution.DataParallel())
import test_keras_callbacks as tests
tests.train_in_parallel(pathlib.Path({folder!r}), "by_processes")
"""


def train_in_parallel(folder, name):
    """Trains with both callbacks on what devices there are; writes what metric_fn received to `folder`."""
    import jax

    assert len(jax.devices()) == 2
    received = []
    model = small_model(KERAS3[0])
    training = tf.data.Dataset.from_tensor_slices((X[:16], Y[:16])).batch(8).repeat()
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(7)  # odd batches, whatever the devices
    measure = KerasMetricCallback(lambda *pair: received.append(pair) or {"n": len(pair[0])}, data)
    push = pushing(folder, "out", hub_model_id=name)
    model.fit(training, steps_per_epoch=2, verbose=0, callbacks=[measure, push])
    np.savez(folder / "received.npz", predictions=received[-1][0], labels=received[-1][1])


class TestJax:
    __test__ = BACKEND == "jax"

    def test_predictions_and_labels_equal_numpy(self, keras):
        model = small_model(keras)
        fit_in_order(model)
        predictions, labels = evaluate(model, tf.data.Dataset.from_tensor_slices((X, Y)).batch(8))
        np.testing.assert_allclose(predictions, by_numpy(model), atol=1e-6)
        np.testing.assert_array_equal(labels, Y)
        assert (type(predictions), predictions.dtype, labels.dtype) == (np.ndarray, np.float32, np.int64)
        assert predictions.flags.writeable

    def test_named_inputs_and_outputs_are_matched_without_the_label_column(self, keras):
        inputs = {name: keras.layers.Input((2,), name=name) for name in ("middle", "zebra")}
        outputs = {
            "sum": keras.layers.Add()(list(inputs.values())),
            "gap": keras.layers.Subtract()(list(inputs.values())),
        }
        model = keras.Model(inputs, outputs)
        data = {"labels": X[:, 1:3], "middle": X[:, :2], "zebra": X[:, 2:]}
        predictions, labels = evaluate(model, data, batch_size=8)
        np.testing.assert_allclose(predictions["sum"], X[:, :2] + X[:, 2:], atol=1e-6)
        np.testing.assert_allclose(predictions["gap"], X[:, :2] - X[:, 2:], atol=1e-6)
        np.testing.assert_array_equal(labels, X[:, 1:3])

    def test_half_precision_arrives_as_float32(self, keras):
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
        try:
            model = small_model(keras)
        finally:
            keras.mixed_precision.set_global_policy("float32")
        predictions, _ = evaluate(model, (X, Y), batch_size=8)
        np.testing.assert_array_equal(predictions, model.predict(X, batch_size=8, verbose=0).astype("float32"))
        assert predictions.dtype == np.float32

    def test_the_model_on_the_hub_loads_with_one_call_and_predicts_the_same(self, keras, tmp_path):
        model = small_model(keras)
        fit_in_order(model, epochs=2, callbacks=[pushing(tmp_path, "by_jax")])
        loaded = keras.saving.load_model("hf://user/by_jax")
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))

    def test_two_host_devices_measure_and_push_what_one_predicts(self, keras, tmp_path):
        devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        children((TWO_HOST_DEVICES.format(folder=str(tmp_path)), devices))
        loaded = keras.saving.load_model("hf://user/parallel")
        received = np.load(tmp_path / "received.npz")
        np.testing.assert_allclose(received["predictions"], by_numpy(loaded), atol=1e-6)
        np.testing.assert_array_equal(received["labels"], Y)

    def test_of_several_processes_the_first_alone_writes_and_commits(self, keras, tmp_path):
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        addresses = ",".join(f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)
        codes = []
        for process, listener in enumerate(listeners):
            listener.close()
            folder = tmp_path / str(process)
            folder.mkdir()
            codes.append(TWO_PROCESSES.format(addresses=addresses, process=process, folder=str(folder)))
        children(*((code, {}) for code in codes))
        loaded = keras.saving.load_model("hf://user/by_processes")
        for folder in (tmp_path / "0", tmp_path / "1"):
            received = np.load(folder / "received.npz")
            np.testing.assert_allclose(received["predictions"], by_numpy(loaded), atol=1e-6)
        assert list((tmp_path / "1" / "out").iterdir()) == []
        assert len(hub.commits("user/by_processes")) == len([stage for stage, _ in hub.requests if stage == "commit"])


class TestLegacySwitch:
    """The same module with TF_USE_LEGACY_KERAS=1, where tf.keras is tf_keras."""

    __test__ = has("tf_keras") and "TF_USE_LEGACY_KERAS" not in os.environ

    def test_metrics_logs_and_pushes_work_with_it(self):
        tests = "TestLogs or TestPush or TestMetricFn"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-k", tests, __file__],
            cwd=HERE,
            env={**os.environ, "TF_USE_LEGACY_KERAS": "1", "HF_ENDPOINT": ""},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:]
        assert " passed" in run.stdout


class TestVendoring:
    def test_the_version_of_the_package_is_that_of_the_module(self):
        config = configparser.ConfigParser()
        config.read(HERE / "setup.cfg")
        assert config["metadata"]["version"] == "attr: keras_callbacks.__version__"
        assert re.fullmatch(r"\d+\.\d+\.\d+", kc.__version__)

    def test_the_signatures_are_the_documented_ones(self):
        metric = "metric_fn eval_dataset output_cols label_cols batch_size predict_with_generate use_xla_generation"
        push = "output_dir save_strategy save_steps tokenizer hub_model_id hub_token checkpoint model_card_args"
        for function, names in [
            (KerasMetricCallback, f"{metric} generate_kwargs"),
            (PushToHubCallback, push),
            (load_repo_checkpoint, "model repo_path_or_name token"),
        ]:
            assert list(inspect.signature(function).parameters) == names.split()


def readme_block(text):
    """The block of Python in the README that holds this text."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if text in block)
    return block


def run_readme_block(text, folder, **names):
    """Runs a block of the README as it stands, in an empty folder and logged in; returns its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", WRITE)
        exec(compile(readme_block(text), "README.md", "exec"), names)
    return names


class TestReadme:
    def test_the_quickstart_loads_back_a_model_with_the_same_f1(self, tmp_path, capsys):
        assert len(readme_block("load_digits").splitlines()) <= 30
        if not KERAS3:
            return  # TensorFlow 2.15 has no Keras 3, which the quickstart is about
        names = run_readme_block("load_digits", tmp_path)
        out = capsys.readouterr().out
        last = float(re.search(r"F1 of the model loaded back: (.*)", out)[1])
        assert names["history"].history["f1_macro"][-1] == pytest.approx(last)
        assert last > 0.9

    def test_the_block_about_resuming_runs(self, keras, tmp_path):
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
        names = run_readme_block("./resumable", tmp_path, model=small_model(keras), train_dataset=data)
        assert names["last"] == {"epoch": 1}
        assert [row["loss"] for row in names["push"].training_history] == sorted(
            (row["loss"] for row in names["push"].training_history), reverse=True
        )

    def test_every_option_has_a_row(self):
        text = (HERE / "README.md").read_text("utf-8")
        for function in (KerasMetricCallback, PushToHubCallback):
            for name in inspect.signature(function).parameters:
                assert name == "model_card_args" or f"| `{name}` |" in text, name
        for name in kc.CARD_ARGS:
            assert f"`{name}`" in text

    def test_every_environment_of_tox_is_in_the_table(self):
        config = configparser.ConfigParser()
        config.read(HERE / "tox.ini")
        text = (HERE / "README.md").read_text("utf-8")
        for name in config["tox"]["env_list"].split(", "):
            assert name == "lint" or f"`{name}`" in text, name


def quickstart():
    """Runs the README's quickstart against the stand-in Hub and prints what lies there afterwards."""
    os.environ["HF_TOKEN"] = WRITE
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(readme_block("load_digits"), "README.md", "exec"), {})
        os.chdir(HERE)
    print("Commits on the Hub:", hub.commits("user/digits"))
    for name, content in on_hub("digits").items():
        print(f"{len(content):9,d} bytes  {name}")


if __name__ == "__main__":
    quickstart()
