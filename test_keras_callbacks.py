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
import functools
import hashlib
import http.server
import io
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
            ((X[:0], Y[:0]), 8, ValueError, "at least one"),
            (tf.data.Dataset.from_tensor_slices((X, Y)).take(0), None, ValueError, "is empty"),
            ((X, Y[:3]), 8, ValueError, r"received lengths \[22, 3\]"),
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
        with pytest.raises(ValueError, match="needs a model that returns a dict"):
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
            ([(2, 3, 7), (3, 5, 2)], "float16", "float16"),
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
        joined = kc.join_batches(list(batches), -100)
        np.testing.assert_array_equal(joined, expected.astype(joined_dtype))
        assert joined.dtype == joined_dtype

    def test_text_is_padded_with_the_empty_string(self):
        words = [np.array([["a", "b"]], object), np.array([["c"]], object)]
        assert kc.join_batches(words, -100).tolist() == [["a", "b"], ["c", ""]]
        assert kc.join_batches([np.array([["a", "b"]]), np.array([["cde"]])], -100).tolist() == [
            ["a", "b"],
            ["cde", ""],
        ]

    def test_bfloat16_is_padded(self):
        dtype = tf.bfloat16.as_numpy_dtype
        joined = kc.join_batches([np.ones((1, 2), dtype), np.ones((1, 1), dtype)], -100)
        assert joined.dtype == dtype
        assert joined.astype("f4").tolist() == [[1, 1], [1, -100]]

    def test_nesting_is_kept_and_missing_parts_are_padding(self):
        batches = [
            {"a": np.ones((2, 1)), "b": (np.ones((2, 2)), [np.zeros((2, 1))])},
            {"a": np.ones((1, 1)), "b": (np.ones((1, 1)), [np.zeros((1, 1)), np.zeros((1, 1))])},
        ]
        joined = kc.join_batches(batches, -100)
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
            kc.join_batches([np.ones(2), np.ones((2, 2))], -100)


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

    @pytest.mark.parametrize("steps_per_execution", [1, 2])
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

    def test_a_model_without_an_optimizer_or_metrics(self, keras, tmp_path):
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
        push = pushing(tmp_path, checkpoint=True)
        push.set_model(model)
        push.on_train_begin()
        push.on_epoch_end(0, {"score": 1.0})
        push.on_train_end()
        np.testing.assert_array_equal(load(keras, download(tmp_path / "d")).get_weights()[0], model.get_weights()[0])


class TestCheckpoint:
    DATA = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)

    @pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "legacy"])
    def test_resuming_from_the_hub_ends_in_the_same_bits(self, keras, tmp_path, optimizer):
        def build():
            legacy = optimizer == "legacy" and keras not in KERAS3
            return small_model(keras, keras.optimizers.legacy.Adam() if legacy else optimizer.replace("legacy", "sgd"))

        def state(model):
            variables = model.optimizer.variables
            return [
                np.asarray(v.numpy()) for v in [*model.variables, *(variables() if callable(variables) else variables)]
            ]

        straight = build()
        straight.fit(self.DATA, epochs=4, verbose=0)
        build_and_stop = build()
        build_and_stop.fit(self.DATA, epochs=2, verbose=0, callbacks=[pushing(tmp_path, checkpoint=True)])
        resumed = build()
        last = load_repo_checkpoint(resumed, "user/model")
        assert last == {"epoch": 1}
        resumed.fit(self.DATA, initial_epoch=last["epoch"] + 1, epochs=4, verbose=0)
        for received, expected in zip(state(resumed), state(straight), strict=True):
            np.testing.assert_array_equal(received, expected)

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
