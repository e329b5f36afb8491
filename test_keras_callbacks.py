"""Tests of keras_callbacks: real models, real `fit`, and the real huggingface_hub client.

The Hub is a stand-in: an HTTP server on loopback, below, which keeps repositories in memory, checks
what it is sent as the real one does, and fails on demand. Then come fixtures and helpers, then the
promises by subject: metric, push, checkpoint, card, faults, ecosystems, README. Classes that need a
library which an environment lacks are not collected there.
"""

import base64
import collections
import concurrent.futures
import configparser
import contextlib
import copy
import csv
import email.utils
import fnmatch
import fractions
import functools
import gc
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.parse
import weakref
import zipfile

HERE = pathlib.Path(__file__).resolve().parent


# The stand-in Hub ----------------------------------------------------------------------------


class Fault:
    """What the stand-in does instead of answering, for the next `times` requests of a stage."""

    def __init__(self, stage, kind, times=1, headers=None, body=b"no"):
        self.stage, self.kind, self.times = stage, kind, times
        self.headers, self.body = headers or {}, body
        self.reached, self.release = threading.Event(), threading.Event()


class Hub:
    """Repositories in memory behind an HTTP server on loopback."""

    TOKENS = dict(hf_write=("user", "write"), hf_read=("user", "read"), hf_other=("other", "write"))
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
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer takes 40 ms
            do_GET = do_HEAD = do_POST = do_PUT = lambda request: self.handle(request)
            log_message = lambda *args: None
        self.lock, self.count, self.faults = threading.RLock(), 0, []
        self.reset()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *client: None  # one that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        with self.lock:
            for fault in self.faults:
                fault.release.set()
            self.repos, self.objects, self.faults, self.requests = {}, {}, [], []
            self.down = False

    def add_fault(self, *args, **kwargs):
        self.faults.append(Fault(*args, **kwargs))
        return self.faults[-1]

    def commits(self, repo_id):
        """The messages of the commits, the first one of all left out."""
        return [commit["message"] for commit in self.repos[repo_id]][1:]

    def files(self, repo_id, index=-1):
        """The contents of a commit's files by name."""
        return self.repos[repo_id][index]["files"]

    def commit(self, repo_id, message, changes, deletions=()):
        with self.lock:
            history = self.repos.setdefault(repo_id, [])
            files = {**(history[-1]["files"] if history else {}), **changes}
            for name in deletions:
                del files[name]
            self.count += 1  # no oid ever comes again: the client keeps what it has read by oid
            oid = hashlib.sha1(f"{repo_id} {self.count}".encode()).hexdigest()
            history.append({"oid": oid, "message": message, "files": files})
            return oid

    def handle(self, request):
        line = f"{request.command} {request.path}"
        stage = next((s for s, pattern in self.STAGES.items() if re.match(pattern, line)), "other")
        with self.lock:
            self.requests.append((stage, line))
            ready = [f for f in self.faults if f.stage in (stage, "any") and f.times > 0]
            fault = ready[0] if ready else Fault(stage, None)
            fault.times -= 1
        if self.down or fault.kind == "drop":  # in the middle of what is being sent
            request.rfile.read(min(10, int(request.headers.get("Content-Length") or 0)))
            fault.reached.set()
            return self.drop(request)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault.reached.set()
        if fault.kind in ("hang", "wait"):  # never answers; or answers once it is released
            fault.release.wait(120)
        if fault.kind == "hang":
            return self.drop(request)
        answer = (fault.kind, fault.body, fault.headers)
        if not isinstance(fault.kind, int):
            with self.lock:
                answer = self.route(request, body)
        if fault.kind == "lost":  # the work is done, but the answer does not arrive
            return self.drop(request)
        self.answer(request, *answer)

    @staticmethod
    def answer(request, status, content, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(OSError):
            request.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(b"" if request.command == "HEAD" else content)

    @staticmethod
    def drop(request):
        request.close_connection = True
        with contextlib.suppress(OSError):
            request.connection.shutdown(socket.SHUT_RDWR)

    def route(self, request, body):
        """Status, content and perhaps headers of the answer to a request."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        user, role = self.TOKENS.get(token, (None, None))
        if lfs := re.fullmatch(r"/lfs/(\w+)/(\d+)", path):
            if hashlib.sha256(body).hexdigest() != lfs[1] or len(body) != int(lfs[2]):
                return 400, {"error": "hash or size is not what was announced"}
            self.objects[lfs[1]] = body
            return 200, b"", {"ETag": '"x"'}
        if user is None and (token or path in ("/api/whoami-v2", "/api/repos/create")):
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"role": role}}
            return 200, {"name": user, "type": "user", "orgs": [], "auth": auth}
        if path == "/api/validate-yaml":
            errors = [{"message": "bad card"}] if "REFUSE" in json.loads(body)["content"] else []
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner, name = asked.get("organization") or user, asked["name"]
            repo_id = name if "/" in name else f"{owner}/{name}"
            answer = {"url": f"{self.url}/{repo_id}", "id": repo_id, "name": repo_id}
            if repo_id in self.repos:
                return 409, {"error": "You already created this model repo", **answer}
            if role != "write" or repo_id.split("/")[0] != user:
                return 403, {"error": "you don't have the rights"}
            self.commit(repo_id, "initial commit", {".gitattributes": b"*.h5 filter=lfs\n"})
            return 200, answer
        found = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?$", path)
        if not found or found[1] not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        repo_id, (action, _, rest) = found[1], (found[2] or "").partition("/")
        history = self.repos[repo_id]
        if action in ("info", "preupload", "commit"):  # info/lfs/objects/batch is the first
            if role != "write" or repo_id.split("/")[0] != user:
                return 403, {"error": "no right to write"}
            if action == "commit":
                return self.route_commit(repo_id, history, map(json.loads, body.splitlines()))
            return self.route_upload(action, history[-1]["files"], json.loads(body))
        revision, _, name = rest.partition("/")
        commit = next((c for c in history if c["oid"] == revision), history[-1])
        files, headers = commit["files"], {"X-Repo-Commit": commit["oid"]}
        if action == "tree":
            parts = [dict(path=n, size=len(c), oid=self.oid(c, n)) for n, c in files.items()]
            return 200, [{"type": "file", **part} for part in parts]
        if action in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            return 200, {"id": repo_id, "sha": commit["oid"], "siblings": siblings, "tags": []}
        if name not in files:
            return 404, {"error": "no such thing"}, {**headers, "X-Error-Code": "EntryNotFound"}
        return 200, files[name], {**headers, "ETag": f'"{self.oid(files[name], name)}"'}

    def route_upload(self, action, files, asked):
        """Answers what is asked before a commit: where LFS files go to, and which they are."""
        if action == "info":
            for item in asked["objects"]:
                if item["oid"] not in self.objects:
                    href = f"{self.url}/lfs/{item['oid']}/{item['size']}"
                    item["actions"] = {"upload": {"href": href}}
            return 200, {"transfer": "basic", "objects": asked["objects"]}
        if len(asked["files"]) > 256:
            return 400, {"error": "at most 256 files"}
        ignored, modes = files.get(".gitignore", b"").decode().split(), []
        for name in (file["path"] for file in asked["files"]):
            mode = {"path": name, "uploadMode": "lfs" if self.is_lfs(name) else "regular"}
            mode["shouldIgnore"] = any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
            modes.append({**mode, "oid": self.oid(files.get(name), name)})
        return 200, {"files": modes}

    def route_commit(self, repo_id, history, lines):
        values = collections.defaultdict(list)
        for line in lines:
            values[line["key"]].append(line["value"])
        (header,) = values["header"]
        if header.get("parentCommit") not in (None, history[-1]["oid"]):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        if not {file["oid"] for file in values["lfsFile"]} <= self.objects.keys():
            return 400, {"error": "LFS object is missing"}
        changes = {file["path"]: base64.b64decode(file["content"]) for file in values["file"]}
        changes |= {file["path"]: self.objects[file["oid"]] for file in values["lfsFile"]}
        deletions = [file["path"] for file in values["deletedFile"]]
        if not set(deletions) <= history[-1]["files"].keys():
            return 404, {"error": "not there"}, {"X-Error-Code": "EntryNotFound"}
        oid = self.commit(repo_id, header["summary"], changes, deletions)
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}

    @staticmethod
    def is_lfs(name):
        return name.endswith((".h5", ".keras", ".npz"))

    def oid(self, content, name):
        """What the Hub identifies a file by: git's hash, or the SHA-256 of an LFS file."""
        if content is None or self.is_lfs(name):
            return content and hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


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
for variable in ("TOKEN", "HUB_TOKEN", "HUB_OFFLINE", "HUB_DISABLE_PROGRESS_BARS"):
    os.environ.pop(f"HF_{variable}", None)

import huggingface_hub
import numpy as np
import pytest
import tensorflow as tf

import keras_callbacks as kc
from keras_callbacks import KerasMetricCallback, PushToHubCallback, load_repo_checkpoint


# Fixtures and helpers ------------------------------------------------------------------------


def has(*libraries):
    """Whether all these are installed; `__test__ = has(...)` decides if a class is collected."""
    return all(importlib.util.find_spec(library) for library in libraries)


def lineages():
    """The Keras packages here: Keras 3, tf_keras, or what TensorFlow 2.15 calls tf.keras."""
    import keras
    found = [keras] if keras.__version__.startswith("3") else [tf.keras]
    return [*found, importlib.import_module("tf_keras")] if has("tf_keras") else found


BACKEND = importlib.import_module("keras").backend.backend()
KERAS3 = [package for package in lineages() if hasattr(package, "ops")]
FIRST = lineages()[0]  # what is about the Hub alone is tested with one Keras package
WRITE = "hf_write"  # a token of the stand-in that may write to the repositories of "user"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(22, 4)).astype("float32")  # 22 examples: the last batch of 8 is smaller
Y = RNG.integers(0, 3, 22)
EvalPair = collections.namedtuple("EvalPair", "predictions labels")
each = pytest.mark.parametrize
BOTH = each("strategy", ["epoch", "no"], ids=["during", "at the end"])
ON_TF = pytest.mark.skipif(BACKEND != "tensorflow", reason="written for TensorFlow alone")
TARGETS, LABEL = X[:, :3] * 2, Y[:, None].astype("float32")
LOSS = "sparse_categorical_crossentropy"
WEIGHTS = "model.weights.h5" if FIRST in KERAS3 else "model.keras"


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
    seconds = dict(FIRST_WAIT=0.01, BACKGROUND_SECONDS=2.0, FINAL_SECONDS=4.0, ATTEMPT_SECONDS=20.0)
    for name, value in seconds.items():
        monkeypatch.setattr(kc, name, value)


@pytest.fixture(scope="module")
def model():
    """One compiled model for the tests about the Hub: each fit goes on where the last one ended."""
    model = small_model(FIRST)
    fit_in_order(model)
    return model


@pytest.fixture
def repo(tmp_path):
    """A name of its own, so that a request left behind never meets another test's repository."""
    return tmp_path.name


@pytest.fixture
def push(tmp_path, repo, model):
    """A PushToHubCallback with a checkpoint whose hooks the test calls itself."""
    push = pushing(tmp_path, repo, checkpoint=True)
    # New weights, so that a request left behind does not send what this test is to send.
    model.set_weights([weight + 0.01 for weight in model.get_weights()])
    begin(push, model)
    return push


def small_model(keras, optimizer="adam", policy="float32", **compile_args):
    """A classifier from 4 numbers to 3 classes, always with the same weights at first."""
    keras.utils.set_random_seed(7)
    keras.mixed_precision.set_global_policy(policy)
    layers = [keras.layers.Input((4,)), keras.layers.Dense(3, activation="softmax")]
    model = keras.Sequential(layers)
    model.compile(optimizer, LOSS, metrics=["accuracy"], **compile_args)
    keras.mixed_precision.set_global_policy("float32")
    return model


def by_numpy(model, x=X):
    """The predictions of small_model, written out."""
    kernel, bias = model.get_weights()
    logits = x @ kernel + bias
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def fit_in_order(model, **options):
    return model.fit(X, Y, **{"batch_size": 8, "shuffle": False, "verbose": 0, **options})


def begin(callback, model, **params):
    """Begins a training whose hooks the test calls itself."""
    callback.set_model(model)
    callback.set_params({"verbose": 0, "epochs": 1, **params})
    callback.on_train_begin()


def measuring(received, data=(X, Y), **options):
    """A KerasMetricCallback that appends what its metric_fn gets to a list."""

    def metric_fn(*pair):
        received.append(EvalPair(*pair))
        return {"n": len(received)}
    return KerasMetricCallback(metric_fn, data, **{"batch_size": 8, **options})


def evaluate(model, dataset, metric_fn=None, logs=None, **options):
    """Runs one epoch's end of KerasMetricCallback outside fit; returns what metric_fn received."""
    received = []
    callback = measuring(received, dataset, **{"batch_size": None, **options})
    if metric_fn is not None:
        callback = KerasMetricCallback(metric_fn, dataset, **options)
    begin(callback, model)
    callback.on_epoch_end(0, {} if logs is None else logs)
    return received[-1] if received else None


def pushing(folder, name="model", **options):
    return PushToHubCallback(folder / name, hub_token=WRITE, **options)


def saved(push, epoch=0):
    """Ends an epoch and waits until its save is on the Hub, or raises what it failed of."""
    push.on_epoch_end(epoch, {"loss": 1 / (epoch + 1)})
    return push.last_job.result(timeout=60)


def at_epoch_end(action, keras=FIRST):
    """A callback that calls the action with each epoch; list it after the one that pushes."""
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: action(epoch))


def awaiting(push, keras=FIRST):
    """A callback that waits at the end of each epoch until its save is on the Hub."""
    return at_epoch_end(lambda epoch: push.last_job.result(timeout=60), keras)


def asked(stage):
    return sum(kind == stage for kind, _ in hub.requests)


def logged(caplog):
    own = [record for record in caplog.records if record.name == "keras_callbacks"]
    return [(record.levelname, record.getMessage()) for record in own]


def on_hub(name="model", index=-1):
    """The files of a repository of "user" in its commit number `index`, by name."""
    return hub.files(f"user/{name}", index)


def download(folder, name="model", index=-1):
    """Writes the files of a commit into a folder, as a user would download them, and returns it."""
    for path, content in on_hub(name, index).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def downloaded(push, index=-1):
    """The folder with what a commit of the callback holds."""
    owner, name = push.hub_model_id.split("/")
    return download(push.output_dir.parent / f"{name} {index}", name, index)


def pushed(push):
    """The files in the newest commit of the callback, by name."""
    return hub.files(push.hub_model_id)


def commits(push):
    return hub.commits(push.hub_model_id)


def load(keras, folder):
    """Loads a plain Keras model with its library's own call."""
    if keras in KERAS3:
        return keras.saving.load_model(folder)
    return keras.models.load_model(folder / "model.keras")


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def leftovers(folder):
    return list(folder.glob(".*"))


def state_of(model):
    """The values of the weights and of the variables of the optimizers that train them."""
    training = getattr(model, "training", lambda: [(model.optimizer, model)])
    owned = [optimizer.variables for optimizer, _ in training()]
    owned = [variables() if callable(variables) else variables for variables in owned]
    return [*model.get_weights(), *(v.numpy() for variables in owned for v in variables)]


def rows_of(card):  # of its table of results
    return [int(epoch) for epoch in re.findall(r"^\| (\d+) \|", card, re.MULTILINE)]


def assert_equal(received, expected):
    """Asserts that two nestings of arrays are the same bits."""
    for left, right in zip(tf.nest.flatten(received), tf.nest.flatten(expected), strict=True):
        np.testing.assert_array_equal(left, right)


def assert_close(received, expected):
    """Asserts that two nestings of arrays hold nearly the same values by the same names."""
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    tf.nest.map_structure(compare, received, expected, check_types=False)


def assert_loads_back(folder, model, keras=FIRST, x=None):
    """Asserts that a folder holds the model's weights, and that what loads predicts the same."""
    loaded = load(keras, folder)
    assert_equal(loaded.get_weights(), model.get_weights())
    if x is not None:
        assert_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def assert_pushed(push, index=-1, **options):
    """Asserts that a commit of the callback, the newest by default, holds the model."""
    assert_loads_back(downloaded(push, index), push.model, **options)


def epoch_of(archive):
    """The newest epoch in the state that a checkpoint holds beside its arrays."""
    return max(map(int, json.loads(archive["state.json"])["history"]))


def assert_one_save(folder):
    """Asserts that model, checkpoint and card are of one and the same save; returns its epoch."""
    with np.load(folder / "checkpoint" / "state.npz") as archive:
        for index, weight in enumerate(load(FIRST, folder).get_weights()):
            np.testing.assert_array_equal(archive[f"model.{index}"], weight)
        epoch = epoch_of(archive)
    assert epoch == rows_of((folder / "README.md").read_text())[-1]
    return epoch


def assert_resumes(make, folder, fit=fit_in_order, callbacks=(), before_loading=None):
    """Asserts that two epochs and, from their checkpoint on the Hub, two more end as four do."""
    whole, half, resumed = make(), make(), make()
    fit(whole, epochs=4)
    fit(half, epochs=2, callbacks=[*callbacks, pushing(folder, "half", checkpoint=True)])
    resumed.set_weights([0 * weight for weight in resumed.get_weights()])
    if before_loading:
        before_loading(resumed)
    last = load_repo_checkpoint(resumed, "user/half", token=WRITE)
    assert last == {"epoch": 1}
    fit(resumed, initial_epoch=last["epoch"] + 1, epochs=4)
    assert_equal(state_of(resumed), state_of(whole))
    assert_equal(*([v.numpy() for v in model.variables] for model in (resumed, whole)))


def padded(rows, padding=-100):
    """One array from rows of different lengths, each padded at the end of its first axis."""
    whole = np.full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), padding, rows[0].dtype)
    for target, row in zip(whole, rows):
        target[: len(row)] = row
    return whole


def as_pipeline(batches):
    """A tf.data pipeline of these batches, whose widths differ."""
    specs = tf.nest.map_structure(lambda c: tf.TensorSpec([None] * c.ndim, c.dtype), batches[0])
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=specs)


def in_batches(*parts, size=8):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(size)


def start_child(code, **environment):
    """Runs code in a new process, which shares this module and its Hub."""
    common = {**os.environ, "STAND_IN_HUB": hub.url, "PYTHONPATH": str(HERE), **environment}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=common, **options)


def children(*codes):
    """Runs pairs of code and environment variables in new processes at once, to their end."""
    started = [start_child(code, **own) for code, own in codes]
    try:
        for child in started:
            output, _ = child.communicate(timeout=180)
            assert child.returncode == 0, output
    finally:
        for child in started:
            child.kill()


def free_addresses(count):
    """Addresses on loopback that nobody listens at."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]


# KerasMetricCallback -------------------------------------------------------------------------


def own_model(keras, *functional, **methods):
    """A compiled model of a class with these methods, whose weights stay as they are in `fit`.

    It is functional with these inputs and outputs, else it holds a dense layer on 4 numbers.
    """

    def init(self):
        keras.Model.__init__(self)
        self.dense = keras.layers.Dense(3)
        self.dense.build((None, 4))

    def train_step(self, *of):  # (data), or on JAX (state, data)
        return {"loss": 0.0} if len(of) == 1 else ({"loss": 0.0}, of[0])
    keras.utils.set_random_seed(7)
    own = {} if functional else {"__init__": init, "call": lambda self, inputs: self.dense(inputs)}
    model = type("Own", (keras.Model,), {**own, "train_step": train_step, **methods})(*functional)
    model.compile("sgd", "mse")
    return model


def after_fit(model, data, **options):
    """What metric_fn receives at the end of a `fit` of one epoch on the data that it evaluates."""
    received = []
    callback = measuring(received, data, **{"batch_size": None, **options})
    model.fit(data, verbose=0, callbacks=[callback])
    return received[-1]


def assert_as_predict(model, data, **options):
    """Asserts that metric_fn gets what Keras' own predict of the data gives; returns the pair."""
    received = after_fit(model, data, **options)
    assert_close(received.predictions, model.predict(data, verbose=0))
    return received


class TestMetricFn:
    """What metric_fn may be, what it receives and what it may return."""

    @each("metric_fn", [
        lambda pair: {"l": sum(pair.label_ids), "p": pair.predictions.sum()},
        lambda pair, tokenizer=None: {"l": sum(pair[1]), "p": pair[0].sum()},
        functools.partial(lambda pair, labels: {"l": sum(pair[1]), "p": pair[0].sum()}, labels=0),
        lambda p, l: {"l": sum(l), "p": p.sum()},
        lambda p, labels=None: {"l": sum(labels), "p": p.sum()},
        lambda p, l, k=1: {"l": sum(l), "p": p.sum()},
        lambda *both: {"l": sum(both[1]), "p": both[0].sum()},
    ], ids=["pair", "pair, default", "partial", "two", "labels=None", "third default", "variadic"])
    def test_one_required_argument_gets_a_named_pair_and_more_get_two(self, metric_fn):
        logs = {}
        evaluate(small_model(FIRST), (X, Y), metric_fn, logs, batch_size=8)
        assert logs == {"l": Y.sum(), "p": pytest.approx(22, abs=1e-3)}  # of each row 1

    @each(
        "metric_fn",
        [None, {"accuracy": 1}, lambda: {}, lambda a, b, c: {}, lambda *, predictions, labels: {}],
    )
    def test_what_cannot_be_called_is_refused_at_construction(self, metric_fn):
        with pytest.raises(TypeError, match="metric_fn must .* but received"):
            KerasMetricCallback(metric_fn, (X, Y), batch_size=8)

    NO_NUMBERS = ["0.5", None, [1.0], np.ones(2), np.ones(1), 1j, {"f": 1.0}]
    NO_FLOATS = [np.ma.masked, np.ma.array(1.0, mask=True), fractions.Fraction(10**400), 10**400]
    REFUSED = [(None, "None"), (0.5, "0.5"), ([("f1", 0.5)], "'f1', 0.5"), ({1: 0.5}, "0.5 for 1")]
    REFUSED += [({"f1": value}, "'f1'") for value in NO_NUMBERS + NO_FLOATS]

    @each("result, shown", REFUSED, ids=lambda value: str(value)[:30])
    def test_anything_but_a_dict_of_numbers_by_name_is_refused_and_shown(self, result, shown):
        with pytest.raises(TypeError, match="(?s)must return a dict of metric names.*" + shown):
            evaluate(small_model(FIRST), (X, Y), lambda p, l: result, batch_size=8)

    def test_values_become_plain_numbers(self):
        values = [np.float32(0.5), np.array(3), tf.constant(0.25), np.bool_(True), 7, math.inf]
        values += [tf.constant(0.5, tf.bfloat16)]
        logs, expected = {}, [0.5, 3, 0.25, True, 7, math.inf, 0.5]
        metric_fn = lambda p, l: dict(zip("abcdefg", values))
        evaluate(small_model(FIRST), (X, Y), metric_fn, logs, batch_size=8)
        assert list(logs.values()) == expected
        assert list(map(type, logs.values())) == list(map(type, expected))


class TestLogs:
    def test_history_and_callbacks_listed_after_it_see_the_metrics_in_place_of_keras_own(
            self, keras, tmp_path, caplog, capsys):
        falling, weights = iter([0.9, 0.8, 0.7, 0.6]), str(tmp_path / "{epoch}-{f1:.1f}.weights.h5")
        callbacks = [
            KerasMetricCallback(lambda p, l: {"f1": next(falling)}, (X, Y), batch_size=8),
            KerasMetricCallback(lambda p, l: {"n": len(p), "accuracy": 2.0}, X[:5], batch_size=8),
            keras.callbacks.EarlyStopping("f1", mode="max", patience=2),
            keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
            keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
            pushing(tmp_path),
        ]
        fit = fit_in_order(small_model(keras), epochs=9, verbose=2, callbacks=callbacks)
        seen = {"f1": [0.9, 0.8, 0.7], "n": [5, 5, 5], "accuracy": [2.0, 2.0, 2.0]}
        assert {name: fit.history[name] for name in seen} == seen
        with open(tmp_path / "log.csv") as file:
            assert [row["f1"] for row in csv.DictReader(file)] == ["0.9", "0.8", "0.7"]
        assert (tmp_path / "1-0.9.weights.h5").exists()
        assert [row["f1"] for row in callbacks[-1].training_history] == seen["f1"]
        assert capsys.readouterr().out.count("accuracy: 2.0000") == 3
        warning = ("WARNING", "metric_fn replaces ['accuracy'] in the logs of this epoch.")
        assert [entry for entry in logged(caplog) if entry[0] == "WARNING"] == [warning]

    @each("verbose, tty, drawn", [(1, 1, 1), ("auto", 1, 1), (0, 1, 0), (2, 1, 0), (1, 0, 0)])
    def test_a_long_evaluation_draws_a_bar_on_a_terminal_and_wipes_it(
            self, monkeypatch, verbose, tty, drawn):
        delays, terminal, tqdm = [], io.StringIO(), kc.tqdm
        terminal.isatty = lambda: bool(tty)
        hurry = lambda *of, delay, **rest: delays.append(delay) or tqdm(*of, mininterval=0, **rest)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(kc, "tqdm", hurry)
        fit_in_order(small_model(FIRST), verbose=verbose, callbacks=[measuring([], batch_size=1)])
        assert ("Evaluating" in terminal.getvalue()) == drawn
        assert not "".join(terminal.getvalue().split("\r")[-2:]).strip()
        assert delays == [2]


class TestEvalDataset:
    ROWS = tf.data.Dataset.from_tensor_slices((X, Y))
    UNKNOWN = tf.data.Dataset.from_generator(lambda: zip(X, Y), ("float32", "int64"))

    @each("data, options, expected", [
        ((X, Y), {}, Y),
        ((X, Y, np.ones(22)), {}, Y),
        ((tf.constant(X), tf.constant(Y)), {}, Y),
        (X, {}, None),
        (tf.constant(X), {}, None),
        ((X,), {}, None),
        ((X, None), {}, None),
        ({"x": X}, {"label_cols": []}, None),
        (in_batches(X, tf.sparse.eye(22)), {}, np.eye(22)),
        (in_batches(X, (Y, None)), {}, (Y,)),
    ], ids="tuple weights tensors array tensor one (x,None) no-columns sparse (y,None)".split())
    def test_plain_data_is_batched_and_gives_labels_or_none(self, keras, data, options, expected):
        x, model = keras.layers.Input((4,), name="x"), small_model(keras)
        named = keras.Model({"x": x}, model(x)) if options else model
        predictions, labels = evaluate(named, data, batch_size=5, **options)
        np.testing.assert_allclose(predictions, by_numpy(model), rtol=1e-5)
        assert_equal([labels], [expected])

    def test_a_data_set_is_read_once_an_epoch_whatever_its_order(self, keras):
        passes, model = [], small_model(keras)

        def shuffled():
            passes.append(RNG.permutation(22))
            yield from ((X[rows], rows) for rows in np.array_split(passes[-1], 3))
        spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int64))
        dataset = tf.data.Dataset.from_generator(shuffled, output_signature=spec)
        predictions, labels = evaluate(model, dataset, batch_size=3)  # batch_size is ignored
        assert_equal([labels], passes)
        np.testing.assert_allclose(predictions, by_numpy(model, X[labels]), rtol=1e-5)

    @each("data, batch_size, error, match", [
        ((X, Y), None, ValueError, "batch_size must be a positive integer"),
        (X, 0, ValueError, "batch_size must be .* received batch_size=0"),
        (ROWS.batch(8).repeat(), None, ValueError, "must be finite"),
        (ROWS, None, ValueError, "must be batched"),
        (ROWS.map(lambda x, y: {"x": x, "labels": y}), None, ValueError, "must be batched"),
        ((X[:0], Y[:0]), 8, ValueError, "is empty"),
        (ROWS.take(0), None, ValueError, "is empty"),
        ((X, Y[:3]), 8, ValueError, "22 and 3"),
        ([X, Y], 8, TypeError, "received list"),
        ((X, Y, Y, Y), 8, ValueError, "have 4 parts"),
    ])
    def test_unusable_data_is_refused_at_construction(self, data, batch_size, error, match):
        with pytest.raises(error, match=match):
            KerasMetricCallback(lambda p, l: {}, data, batch_size=batch_size)

    @each("data, match", [
        (ROWS.batch(8).filter(lambda x, y: False), "gave none"),
        (UNKNOWN, "must be batched"),
    ], ids=["empty", "unbatched"])
    def test_what_shows_only_when_data_are_read_is_refused_then(self, data, match):
        with pytest.raises(ValueError, match=match):
            evaluate(small_model(FIRST), data)


class TestLabelsAndNoLabels:
    POSITIONS = {"ids": X, "start_positions": X + 1, "end_positions": X + 2}
    COLUMNS = {**POSITIONS, "labels": X + 3}
    ABC = (X, {"a": Y, "b": Y + 1, "c": Y + 2})

    @each("data, wanted, expected", [
        (COLUMNS, None, X + 3),
        (POSITIONS, None, {"start_positions": X + 1, "end_positions": X + 2}),
        ((COLUMNS, Y), None, Y),
        (COLUMNS, "end_positions", X + 2),
        (COLUMNS, ["end_positions"], X + 2),
        ((COLUMNS, {"ids": X + 4, "n": Y}), "ids", X + 4),
        (ABC, ["c", "a"], {"c": Y + 2, "a": Y}),
        ((X, {"a": Y}), None, Y),
        (COLUMNS, [], None),
        ((COLUMNS, Y), [], None),
        ((COLUMNS, None), None, None),
        ((COLUMNS,), None, None),
        ((COLUMNS, None, np.ones(22)), None, None),
    ], ids="labels positions tuple one list both of-labels single none none-of-pair (x,None) (x,)"
       " (x,None,weights)".split())
    def test_where_labels_come_from_and_that_they_take_no_input_away(
            self, keras, caplog, data, wanted, expected):
        model = own_model(keras, call=lambda self, inputs: sum(tf.nest.flatten(inputs)))
        predictions, labels = evaluate(model, data, batch_size=8, label_cols=wanted)
        inputs = data[0] if isinstance(data, tuple) else data
        np.testing.assert_allclose(predictions, sum(tf.nest.flatten(inputs)), rtol=1e-6)
        assert_equal([labels], [expected])
        assert not isinstance(expected, dict) or list(labels) == list(expected)
        is_guess = isinstance(data, dict) and wanted is None
        assert [level for level, _ in logged(caplog)] == ["WARNING"] * is_guess

    @each("data, wanted, match", [
        ({"ids": X, "label": Y}, None, r"set label_cols .* \['ids', 'label'\], or label_cols=\[\]"),
        ({"ids": X, "labels": Y}, ["target"], r"has \['ids', 'labels'\], .* \['target'\]"),
        ((X, Y), ["labels"], "no named columns"),
    ])
    def test_columns_that_cannot_be_found_are_refused_with_a_list(self, data, wanted, match):
        with pytest.raises(ValueError, match=match):
            KerasMetricCallback(lambda p, l: {}, data, batch_size=8, label_cols=wanted)

    @each("data, names, predictions, labels", [
        ({"labels": X * 9, "query": X * 3, "reply": X}, ["query", "reply"], X * 2, X * 9),
        ({"labels": X, "query": X * 3}, ["query", "labels"], X * 2, X),  # an input called so
        (({"x": X * 3, "y": X}, {"x": X + 1}), ["x", "y"], X * 2, X + 1),  # labels called so
    ], ids=["extra column", "input named labels", "labels named as an input"])
    def test_a_functional_model_gets_just_the_columns_it_has_inputs_for(
            self, keras, data, names, predictions, labels):
        inputs = {name: keras.layers.Input((4,), name=name) for name in names}
        model = keras.Model(inputs, keras.layers.Subtract()([inputs[name] for name in names]))
        assert_close(evaluate(model, data, batch_size=8), EvalPair(predictions, labels))

    @pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match:UserWarning")
    def test_a_sequential_model_gets_the_column_of_its_input(self, keras):
        layers = [keras.layers.Input((4,), name="x"), keras.layers.Rescaling(2.0)]
        received = evaluate(keras.Sequential(layers), {"x": X, "labels": -X}, batch_size=8)
        assert_equal(received.predictions, X * 2)


class TestPredictions:
    """Outputs equal those of Keras' own predict, or NumPy written out."""

    def test_several_inputs_and_outputs_in_any_nesting(self, keras):
        one, two = keras.layers.Input((4,), name="one"), keras.layers.Input((4,), name="two")
        model = keras.Model([one, two], [keras.layers.Add()([one, two]), one])
        received = evaluate(model, ((X, X * 2), Y), batch_size=8)
        assert_close(received.predictions, (X * 3, X))

    @each("names, wanted, kept", [
        ("abc", None, "abc"),
        ("abc", ["c", "a"], "ca"),
        ("abc", ["loss", "c"], ["loss", "c"]),
        ("abc", "b", "b"),
        ("", None, ["loss"]),
    ])
    def test_outputs_by_name_without_the_loss_unless_it_is_named_or_alone(
            self, keras, names, wanted, kept):
        inputs, scales = keras.layers.Input((4,)), {"a": 2.0, "b": 3.0, "c": 4.0, "loss": 5.0}
        outputs = {name: keras.layers.Rescaling(scales[name])(inputs) for name in [*names, "loss"]}
        model = keras.Model(inputs, outputs)
        received = evaluate(model, X, batch_size=8, output_cols=wanted).predictions
        received = received if isinstance(received, dict) else {kept[0]: received}
        assert list(received) == list(kept)
        for name, output in received.items():
            np.testing.assert_allclose(output, X * scales[name], rtol=1e-6)

    @each("named, options, match", [
        (True, {"output_cols": ["logits"]}, r"output_cols must .*\['a'\].*\['logits'\]"),
        (False, {"output_cols": ["logits"]}, "output_cols must .* Sequential, which are not named"),
        (False, {"predict_with_generate": True}, "needs a model with a method generate"),
    ])
    def test_what_a_model_cannot_give_is_refused_before_the_first_epoch(
            self, keras, named, options, match):
        inputs, model = keras.layers.Input((4,)), small_model(keras)
        model = keras.Model(inputs, {"a": model(inputs)}) if named else model
        with pytest.raises(ValueError, match=match):
            begin(measuring([], **options), model)

    @each("policy, options", [
        ("float32", {"run_eagerly": True}),
        ("float32", {"jit_compile": True}),
        ("float32", {"steps_per_execution": 3}),
        ("mixed_float16", {}),
        ("mixed_bfloat16", {}),
    ])
    def test_they_are_float32_however_the_model_is_compiled(self, keras, policy, options):
        model = small_model(keras, "sgd", policy, **options)
        received = evaluate(model, (X, Y), batch_size=8).predictions
        expected = model.predict(X, batch_size=8, verbose=0)
        assert (expected.dtype, received.dtype) == (policy.removeprefix("mixed_"), np.float32)
        np.testing.assert_allclose(received, expected.astype("f4"), rtol=1e-5)

    ROWS = [np.arange(length) for length in (3, 1, 2, 4, 1)]
    RAGGED = in_batches(tf.ragged.constant(list(map(list, ROWS))), size=2)

    @ON_TF
    @each("step, data, expected", [
        (tf.reduce_mean, in_batches(X), [X[:8].mean(), X[8:16].mean(), X[16:].mean()]),
        (tf.identity, RAGGED, padded(ROWS)),
    ], ids=["a scalar for each batch", "ragged"])
    def test_a_predict_step_may_give_scalars_or_ragged_tensors(self, step, data, expected):
        model = own_model(lineages()[-1], predict_step=lambda self, x: step(x))
        np.testing.assert_allclose(evaluate(model, data).predictions, expected, rtol=1e-5)

    def test_a_model_that_is_unbuilt_until_its_first_batch(self, keras):
        model, received = keras.Sequential([keras.layers.Dense(3)]), []
        model.compile("sgd", "mse")
        model.fit(X, X[:, :3], verbose=0, callbacks=[measuring(received)])
        kernel, bias = model.get_weights()
        assert_close(received[0].predictions, X @ kernel + bias)

    def test_outside_fit_they_are_fresh_arrays_of_the_model_and_the_weights_of_now(self, keras):
        received, model, other = [], small_model(keras), small_model(keras)
        callback = measuring(received, batch_size=32)  # one batch, which need not be joined
        other.set_weights([w + 1 for w in other.get_weights()])
        for of_now in (model, model, other):
            callback.set_model(of_now)
            callback.on_epoch_end(0, {})
            np.testing.assert_allclose(received[-1].predictions, by_numpy(of_now), rtol=1e-5)
            assert_equal(received[-1].labels, Y)
            received[-1].predictions[:] = received[-1].labels[:] = -100
            of_now.set_weights([w * 2 for w in of_now.get_weights()])

    def test_a_deep_copy_works_like_the_original(self, keras, tmp_path):
        model = small_model(keras)
        measure, push = copy.deepcopy([measuring([]), pushing(tmp_path)])
        assert fit_in_order(model, callbacks=[measure, push]).history["n"] == [1]
        assert_pushed(push, keras=keras)


class TestJoining:
    """Batches become one array, against NumPy written out."""

    @staticmethod
    def joined_labels(batches):
        pairs = [(np.zeros((len(batch), 4), "float32"), batch) for batch in batches]
        return evaluate(small_model(FIRST), as_pipeline(pairs)).labels

    @staticmethod
    def joined_generations(*batches):
        replies = iter(batches)
        model = own_model(FIRST, generate=lambda self, inputs: next(replies))
        data = in_batches(X[: 2 * len(batches)], size=2)
        return evaluate(model, data, predict_with_generate=True).predictions

    @each("shapes, dtype, joined_dtype", [
        ([(4, 3), (4, 3), (1, 3)], "float32", "float32"),
        ([(2, 3), (2, 5), (1, 4)], "int64", "int64"),
        ([(2, 3, 7), (3, 5, 2)], "float16", "float32"),
        ([(1, 2), (1, 1)], tf.bfloat16.as_numpy_dtype, "float32"),
        ([(2, 3), (2, 3)], "uint8", "uint8"),
        ([(2, 3), (2, 4)], "uint8", "int16"),
        ([(2, 3), (2, 4)], "bool", "int8"),
        ([(2, 3), (2, 4)], "uint32", "int64"),
        ([(2, 0), (2, 2)], "float64", "float64"),
        ([(5,), (1,)], "int32", "int32"),
    ])
    def test_every_axis_is_padded_and_the_dtype_widened_only_where_needed(
            self, shapes, dtype, joined_dtype):
        batches = [RNG.integers(0, 2, shape).astype(dtype) for shape in shapes]
        longest, expected = np.max([batch.shape[1:] for batch in batches], axis=0), []
        for batch in batches:
            missing = [(0, 0), *((0, size) for size in longest - batch.shape[1:])]
            expected.append(np.pad(batch.astype(object), missing, constant_values=-100))
        joined = self.joined_labels(batches)
        np.testing.assert_array_equal(joined, np.concatenate(expected).astype(joined_dtype))
        assert joined.dtype == joined_dtype

    @each("dtype, rows, expected, joined_dtype", [
        ("uint64", [[1, 2], [3, 2**63], [4, 5]], [[1, 2], [3, 2**63], [4, 5]], "uint64"),
        ("uint64", [[1, 2], [2**63 - 1], [5]], [[1, 2], [2**63 - 1, -100], [5, -100]], "int64"),
        ("uint64", [[2**64 - 1], [1], [5, 6]], [[2**64 - 1, -100], [1, -100], [5, 6]], object),
        ("uint64", [[1, 2], [3, 4], [2**63], [5, 6]], [[1, 2], [3, 4], [2**63, -100], [5, 6]], object),
        ("uint64", [[1], [3], [2**63, 4], [5]], [[1, -100], [3, -100], [2**63, 4], [5, -100]], object),
        ("uint8", [[1, 2], [3]], [[1, 2], [3, -100]], "int16"),
        ("bool", [[True, False], [True], []], [[1, 0], [1, -100], [-100, -100]], "int8"),
        ("bool", [[True, False], [False, True]], [[True, False], [False, True]], "bool"),
        ("int32", [[[1, 2]], [[4]], []], [[[1, 2]], [[4, -100]], [[-100, -100]]], "int32"),
    ])
    def test_ragged_labels_arrive_padded_and_keep_every_digit(
            self, dtype, rows, expected, joined_dtype):
        data = in_batches(X[: len(rows)], tf.ragged.constant(rows, dtype), size=2)
        labels = evaluate(small_model(FIRST), data).labels
        assert (labels.tolist(), labels.dtype) == (expected, joined_dtype)

    def test_text_arrives_as_str_padded_with_the_empty_string_and_other_bytes_as_they_are(self):
        words = [[["caf\u00e9".encode(), b"b"]], [[b"\xff\xfe"]]]
        joined = self.joined_labels([np.array(batch, object) for batch in words])
        assert joined.tolist() == [["caf\u00e9", "b"], [b"\xff\xfe", ""]]

    def test_nesting_is_kept_and_missing_parts_are_padding(self):
        one, zero = np.ones((2, 1)), np.zeros((2, 1))
        first = {"a": one, "b": (np.ones((2, 2)), (zero,))}
        joined = self.joined_generations(first, {"a": one, "b": (one, (zero, zero))})
        assert joined["a"].tolist() == [[1]] * 4
        assert type(joined["b"]) is tuple
        assert joined["b"][0].tolist() == [[1, 1], [1, 1], [1, -100], [1, -100]]
        assert [part.tolist() for part in joined["b"][1]] == [[[0]] * 4, [[-100], [-100], [0], [0]]]

    AB, SAME = {"a": np.ones(2), "b": np.ones(2)}, r"same structure, .*\['dict', 'ndarray'\]"

    @each("first, second, match", [
        (np.ones(2), np.ones((2, 2)), r"same number of axes, .*\[1, 2\]"),
        (AB, {"a": np.ones(2), "c": np.ones(2)}, r"columns, .*\['a', 'b'\] .*\['a', 'c'\]"),
        (AB, {"a": np.ones(2)}, SAME),
        ({"a": np.ones(2)}, AB, SAME),
    ], ids=["axes", "names", "fewer columns", "more columns"])
    def test_batches_that_differ_in_structure_are_refused(self, first, second, match):
        with pytest.raises(ValueError, match="All batches must have the .*" + match):
            self.joined_generations(first, second)


@ON_TF
class TestAsPredict:
    """What users' code gets and gives is what it does in Keras' own predict of the data set."""

    @staticmethod
    def step_on_all(self, data):
        x, y, weights = data
        return self(x) + y * 2 * weights[:, None]

    @each("where", ["class", "instance"])
    @each("method, options", [
        ("predict_step", {}),
        ("predict_step", {"run_eagerly": True}),
        ("predict_step", {"steps_per_execution": 3}),
        ("make_predict_function", {}),
        ("predict", {}),
        ("predict_on_batch", {}),
    ])
    def test_every_point_of_override_counts_as_it_does_in_predict(
            self, keras, method, options, where):
        def make_predict_function(self, force=False):
            if self.predict_function is None or force:
                step = keras.Model.make_predict_function(self, force) or self.predict_function
                self.predict_function = lambda iterator: 2 * step(iterator)
            return self.predict_function

        def predict(self, x, **options):
            return keras.Model.predict(self, x.map(lambda x, *others: (3 * x, *others)), **options)

        def predict_on_batch(self, x):  # which predict does not call
            return keras.Model.predict_on_batch(self, x) * 2
        function = {**locals(), "predict_step": self.step_on_all}[method]
        model = own_model(keras, **({method: function} if where == "class" else {}))
        if where == "instance":
            setattr(model, method, types.MethodType(function, model))
        model.compile("sgd", "mse", **options)
        received = assert_as_predict(model, in_batches(X, TARGETS, np.ones(22, "float32")))
        assert_equal(received.labels, TARGETS)

    def test_a_predict_step_has_its_replica_context_and_needs_no_call(self, keras):
        def predict_step(self, data):
            assert tf.distribute.has_strategy()
            context = tf.distribute.get_replica_context()
            fakes = self.dense(data) * context.all_reduce("sum", tf.constant(5.0))
            return {"fakes": fakes, "scores": tf.reduce_sum(fakes, -1)}
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            model = own_model(keras, call=keras.Model.call, predict_step=predict_step)
        data = in_batches(X)
        assert_close(evaluate(model, data).predictions, model.predict(data, verbose=0))

    @each("method, functional", [("call", True), ("call", False), ("predict_step", True)])
    def test_a_method_of_ones_own_gets_all_columns_and_names_the_outputs(
            self, keras, method, functional):
        def call(self, x, training=None, mask=None):
            return {"hidden": x["a"], "logits": x["a"] + x.get("b", 0)}
        a = keras.layers.Input((4,), name="a")
        own = {method: call if method == "call" else lambda self, data: call(self, data[0])}
        model = own_model(keras, *([{"a": a}, {"hidden": a}] if functional else []), **own)
        model({"a": a})  # as for summary
        received = after_fit(model, in_batches({"a": X, "b": X}, TARGETS), output_cols=["logits"])
        np.testing.assert_array_equal(received.predictions, X * 2)


class TestQuestions:
    """What a `generate` of one's own gets, and what it may return."""

    @each("tokens, config, options, padding", [
        (lambda n: [n] * n, {}, {}, -100),
        (lambda n: np.array([n] * n), {"pad_token_id": 9}, {}, 9),
        (lambda n: tf.constant([n] * n), {"pad_token_id": 9}, {"pad_token_id": 7}, 7),
        (lambda n: ["a"] * n, {}, {}, ""),  # as PARSeq reads
    ], ids=["lists", "arrays, token of the model", "tensors, token given to generate", "letters"])
    def test_tokens_for_each_example_are_a_row(self, keras, tokens, config, options, padding):
        model = own_model(keras, generate=lambda self, x, **options: [tokens(int(n)) for n in x])
        model.config, counts = types.SimpleNamespace(**config), np.array([1, 2, 3, 1, 2])
        generation = {"predict_with_generate": True, "generate_kwargs": options}
        received = evaluate(model, (counts, counts), batch_size=2, **generation).predictions
        expected = [[*np.array(tokens(n)).tolist(), *[padding] * (3 - n)] for n in counts]
        assert received.tolist() == expected

    @each("use_xla", [False, True])
    def test_text_in_text_out_and_xla_warns_that_it_has_no_effect(self, keras, caplog, use_xla):
        generate = lambda self, x: [word.decode() * 2 for word in x.numpy()]
        model, words = own_model(keras, generate=generate), np.array(["one", "two", "three"])
        options = dict(predict_with_generate=True, use_xla_generation=use_xla)
        predictions, labels = evaluate(model, (words, words), batch_size=2, **options)
        assert predictions.tolist() == ["oneone", "twotwo", "threethree"]
        assert labels.tolist() == ["one", "two", "three"]
        assert ("compile(jit_compile=True)" in caplog.text) is use_xla

    MASK = np.tile([1.0, 1.0, 1.0, 0.0], (22, 1)).astype("float32")
    ANSWERED = {"ids": X, "answer": X * 2}
    NAMED = {"ids": X, "mask": MASK, "more": X}, {"ids": X + 1, "mask": MASK}
    masked = lambda self, x: x["ids"] * x["mask"]
    ids_only = lambda self, x: x["ids"] + x.get("answer", 0)
    TAKEN = {  # what generate does, data, options, expected predictions
        "tuple of outputs": (lambda self, x: (x * 2, x[:, 0]), (X, Y), {}, (X * 2, X[:, 0])),
        "tuple of inputs": (lambda self, x: x[0] * x[1], ((X, MASK), Y), {}, X * MASK),
        "the answer in the inputs": (ids_only, (ANSWERED, {"answer": X * 2}), {}, X),
        "label_cols are no question": (ids_only, ANSWERED, {"label_cols": "answer"}, X),
        "labels named as the question": (masked, NAMED, {}, X * MASK),
        "one of them": (masked, NAMED, {"label_cols": "ids"}, X * MASK),
        "the same columns as labels": (ids_only, ({"ids": X}, {"ids": X}), {}, X),
        "generate_kwargs of any kind": (
            lambda self, x, bias: x + bias[1, 2] + bias["a"],
            (X, Y),
            {"generate_kwargs": {"bias": {(1, 2): X[0], "a": 1.0}}},
            X + X[0] + 1,
        ),
        "no columns to choose": (lambda self, x: x * 2, X, {"output_cols": ["b"]}, X * 2),
    }

    @each("generate, data, options, expected", TAKEN.values(), ids=TAKEN)
    def test_inputs_and_outputs_keep_their_nesting_without_the_answer(
            self, keras, generate, data, options, expected):
        model = own_model(keras, generate=generate)
        received = evaluate(model, data, batch_size=8, predict_with_generate=True, **options)
        assert_close(received.predictions, expected)


@ON_TF
class TestCompiledFunctions:
    """What is compiled lives as long as what it was made from: no longer, and no shorter."""

    @each("method", ["call", "predict_step"])
    def test_the_model_is_traced_in_the_first_of_several_fits_only(self, keras, method):
        traces, counts = [], []

        def traced(self, data):
            traces.append(method)
            return self.dense(data[0] if method == "predict_step" else data)
        model, data = own_model(keras, **{method: traced}), in_batches(X, TARGETS)
        callback = measuring([], data)
        for _ in range(3):
            model.fit(data, verbose=0, callbacks=[callback])
            counts.append(len(traces))
        assert counts == counts[:1] * 3

    def test_a_model_that_is_compiled_anew_within_a_fit_is_measured_as_it_is(self, keras):
        call = lambda self, inputs: inputs * (2.0 if tf.executing_eagerly() else 1.0)
        layer = type("Own", (keras.layers.Layer,), {"call": call})()
        model, received = keras.Sequential([keras.layers.Input((4,)), layer]), []
        callback = measuring(received, in_batches(X, X))
        begin(callback, model)
        model.compile("sgd", "mse")
        callback.on_epoch_end(0, {})
        model.add(keras.layers.Rescaling(5.0))
        model.compile("sgd", "mse")
        callback.on_epoch_end(1, {})
        model.compile("sgd", "mse", run_eagerly=True)
        callback.on_epoch_end(2, {})
        assert_close([pair.predictions for pair in received], [X, X * 5, X * 10])


# PushToHubCallback ---------------------------------------------------------------------------


def write_files(folder, *names, text="the user's"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


class TestPushArguments:
    @each("arguments, error, match", [
        ({"save_strategy": "batch"}, ValueError, r"\['no', 'steps', 'epoch'\], .* 'batch'"),
        ({"save_strategy": "steps"}, ValueError, "save_steps must be .* save_steps=None"),
        ({"save_strategy": "steps", "save_steps": 0}, ValueError, "save_steps=0"),
        ({"save_strategy": "steps", "save_steps": 2.0}, ValueError, "save_steps=2.0"),
        ({"save_strategy": "no", "checkpoint": True}, ValueError, 'needs save_strategy="epoch"'),
        ({"tokenizer": "bert"}, TypeError, "save_pretrained or save_to_preset, .* str"),
        ({"licence": "mit"}, TypeError, r"'finetuned_from'.*but received \['licence'\]"),
    ])
    def test_what_does_not_fit_is_refused_before_anything_is_made(
            self, tmp_path, arguments, error, match):
        with pytest.raises(error, match=match):
            pushing(tmp_path, **arguments)
        assert not hub.repos
        assert not list(tmp_path.iterdir())

    @each("strategy", ["No", kc.IntervalStrategy.NO, types.SimpleNamespace(value="no")])
    def test_the_strategy_in_any_case_or_as_an_enum(self, tmp_path, strategy):
        assert pushing(tmp_path, save_strategy=strategy).save_strategy == "no"

    @each("asked_for, repo_id", [(None, "user/model"), ("a", "user/a"), ("user/b", "user/b")])
    def test_the_repository_is_named_after_the_folder_or_as_asked(
            self, tmp_path, monkeypatch, asked_for, repo_id):
        monkeypatch.setenv("HF_TOKEN", WRITE)  # the cached token will do
        for _ in range(2):  # the second time it exists
            push = PushToHubCallback(tmp_path / "model", hub_model_id=asked_for)
            assert push.hub_model_id == repo_id
        assert list(hub.repos) == [repo_id]

    @each("exists", [True, False])
    @each("token, owner", [("hf_read", "user"), (WRITE, "other"), ("hf_wrong", "user")])
    def test_a_token_that_may_not_write_is_refused_at_construction_without_a_commit(
            self, tmp_path, token, owner, exists):
        if exists:
            hub.commit(f"{owner}/taken", "initial commit", {"a.txt": b"a"})
        with pytest.raises(huggingface_hub.utils.HfHubHTTPError, match="401|403"):
            PushToHubCallback(tmp_path / "taken", hub_model_id=f"{owner}/taken", hub_token=token)
        assert [hub.commits(name) for name in hub.repos] == [[]] * exists


class TestPush:
    def test_each_epoch_is_one_commit_and_the_end_another_of_all_that_output_dir_holds(
            self, keras, tmp_path):
        push, model = pushing(tmp_path, checkpoint=True), small_model(keras)
        add_one = lambda logs: model.set_weights([w + 1 for w in model.get_weights()])
        change = keras.callbacks.LambdaCallback(on_train_end=add_one)
        fit_in_order(model, epochs=3, callbacks=[change, push, awaiting(push, keras)])
        progress = [f"Training in progress, epoch {epoch}" for epoch in range(3)]
        assert commits(push) == [*progress, "End of training"]
        assert_pushed(push, keras=keras, x=X)
        assert contents(push.output_dir) == {n: c for n, c in pushed(push).items() if n[0] != "."}
        assert not leftovers(push.output_dir)

    def test_nothing_holds_on_to_a_model_that_was_pushed(self, keras, tmp_path):
        model, push = small_model(keras), pushing(tmp_path)
        fit_in_order(model, callbacks=[push])
        held = weakref.ref(model)
        del model, push
        gc.collect()
        assert held() is None

    # after batches 2, 3, 5, 6, 8, 9, 11, 12 with two steps in one execution; PyTorch knows but one
    STEPS = [(1, [5, 10]), (2, [5, 11])][: 1 if BACKEND == "torch" else 2]

    @each("steps_per_execution, expected", STEPS)
    def test_steps_are_counted_through_epochs_and_executions(
            self, keras, tmp_path, steps_per_execution, expected):
        push = pushing(tmp_path, save_strategy="steps", save_steps=5)  # an epoch has three batches
        wait = lambda batch, logs: concurrent.futures.wait([push.last_job] if push.last_job else [])
        callbacks = [push, keras.callbacks.LambdaCallback(on_train_batch_end=wait)]
        model = small_model(keras, steps_per_execution=steps_per_execution)
        fit_in_order(model, epochs=4, callbacks=callbacks)
        progress = [f"Training in progress, step {step}" for step in expected]
        assert commits(push) == [*progress, "End of training"]

    @each("strategy, verbose", [("no", 2), ("epoch", 0)])
    def test_the_user_reads_where_the_final_state_goes_and_nothing_with_verbose_0(
            self, model, tmp_path, capfd, strategy, verbose):
        push, address = pushing(tmp_path, save_strategy=strategy), f"{hub.url}/user/model"
        fit_in_order(model, epochs=2, verbose=verbose, callbacks=[push])
        push.on_train_end()  # the Hub has this state already
        out, err = capfd.readouterr()
        written = rf"Pushing .* to {address}\nPushed: {address}/commit/\w+\n" * 2
        assert re.search(f"loss.*\n{written}$", out) if verbose else out == ""
        assert ("100%" in err) is (verbose > 0)  # huggingface_hub's own progress bar
        assert not huggingface_hub.utils.are_progress_bars_disabled()

    def test_attributes_of_code_written_for_transformers(self, model, tmp_path):
        push = pushing(tmp_path)
        assert (push.output_dir, push.last_job) == (tmp_path / "model", None)
        history = fit_in_order(model, epochs=2, callbacks=[push]).history
        assert [row["loss"] for row in push.training_history] == pytest.approx(history["loss"])
        assert push.last_job.result().oid == hub.repos[push.hub_model_id][-1]["oid"]

    @each("kind", ["trained", "not trained", "not compiled"])
    def test_a_model_of_several_inputs_and_outputs_loads_back(self, keras, tmp_path, kind):
        x = {"one": X, "two": X}
        inputs = {name: keras.layers.Input((4,), name=name) for name in x}
        both = keras.layers.Add()(list(inputs.values()))
        model = keras.Model(inputs, [keras.layers.Dense(2)(both), keras.layers.Dense(3)(both)])
        push = pushing(tmp_path, checkpoint=True)
        if kind != "not compiled":
            model.compile("sgd", ["mse", "mse"])
        if kind == "trained":
            model.fit(x, [X[:, :2], X[:, :3]], verbose=0)
        begin(push, model)
        push.on_epoch_end(0, {})
        push.on_train_end()
        assert_pushed(push, keras=keras, x=x)

    def test_the_last_job_cannot_be_cancelled_so_that_fit_cannot_hang(self, push):
        fault = hub.add_fault("commit", "wait")
        push.on_epoch_end(0, {})
        assert fault.reached.wait(60)
        assert not push.last_job.cancel()
        fault.release.set()
        push.on_train_end()
        assert commits(push)[0] == "Training in progress, epoch 0"


class TestPushedFiles:
    """Of output_dir and of the repository, to which others write too."""

    SECRETS = """
        .env .env.local .netrc .git/config .cache/x my.pem my.key prod.env kaggle.json
        credentials.json Credentials credentials.d/a.txt token token.txt stored_tokens _netrc
        client_secret_1.json id_rsa id_rsa.pub id_ed25519 my.p12 my.pfx
    """.split()

    def test_credentials_and_caches_are_not_pushed_but_what_is_of_the_model_is(self, push):
        for folder in ("", "logs", "logs/deeper"):
            write_files(push.output_dir / folder, *self.SECRETS, "plain.txt")
        # as a tokenizer might name a file
        write = lambda folder: write_files(pathlib.Path(folder), "bpe.key", text="a b")
        push.tokenizer = types.SimpleNamespace(save_pretrained=write)
        saved(push)
        names = {name for name, content in pushed(push).items() if content == b"the user's"}
        assert names == {"plain.txt", "logs/plain.txt", "logs/deeper/plain.txt"}
        assert (push.output_dir / "bpe.key").read_bytes() == pushed(push)["bpe.key"] == b"a b"

    def test_many_files_of_others_are_told_once_and_cost_a_handful_of_requests(
            self, model, tmp_path, caplog):
        names = [f"data/file-{index}.csv" for index in range(300)]
        write_files(tmp_path / "model", *names, ".env", "token")
        push = pushing(tmp_path, save_strategy="no")
        ((level, message),) = logged(caplog)
        assert level == "WARNING" and re.search(r"\b300\b", message)
        assert 1 <= message.count("file-") <= 10 and not re.search(r"\.env|token", message)
        hub.requests.clear()
        fit_in_order(model, callbacks=[push])
        stages = collections.Counter(stage for stage, _ in hub.requests)
        assert stages.total() - stages["batch"] - stages["lfs"] <= 6, stages
        assert pushed(push).keys() >= set(names)
        caplog.clear()
        pushing(tmp_path)  # all of them are on the Hub now
        assert logged(caplog) == []

    @each("name", ["events.out.tfevents.1", "logs/growing.h5"])
    def test_a_file_that_grows_during_the_upload_does_not_break_it(self, push, name):
        path = push.output_dir / name
        write_files(push.output_dir, name, text="begin ")
        faults = [hub.add_fault(stage, "wait") for stage in ("preupload", "commit")]
        push.on_epoch_end(0, {"loss": 0.5})
        for fault in faults:
            assert fault.reached.wait(60)
            with path.open("ab") as file:
                file.write(b"more " * 1000)
            fault.release.set()
        push.last_job.result(timeout=60)
        assert pushed(push)[name] == b"begin "
        saved(push, 1)
        assert pushed(push)[name] == path.read_bytes()

    @each("secrets", [[], [".env", "notes/.env", "key.pem", "kaggle.json", "notes/id_rsa"]])
    def test_the_command_of_the_warning_pushes_what_would_have_been_pushed(
            self, push, tmp_path, caplog, secrets):
        write_files(push.output_dir, "notes/mine.txt", *secrets)
        hub.add_fault("commit", 403, times=99)
        push.on_train_end()
        hub.faults.clear()
        ((_, message),) = logged(caplog)
        command = message.splitlines()[-1]
        assert re.search("HF_TOKEN|--token", message)
        assert ("--exclude" in command) is bool(secrets)
        assert ("*.p12" in command, len(command) < 400) == (False, True)
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        options = {"env": {**os.environ, "HF_TOKEN": WRITE, "PATH": path}, "cwd": tmp_path}
        run = subprocess.run(command, shell=True, capture_output=True, text=True, **options)
        assert run.returncode == 0, run.stdout + run.stderr
        own = contents(push.output_dir).keys() - set(secrets)
        assert pushed(push).keys() - {".gitattributes"} == own


# Checkpoint ----------------------------------------------------------------------------------


class TestCheckpoint:
    KEPT = ["new process", "mixed_float16", "legacy", "average", "frozen", "other weights at end"]
    TOLD = ["Nadam", "Dropout", "GaussianNoise"]  # in the README, of Keras 2 alone

    @each("kind", [*KEPT, *TOLD, "recurrent"])
    def test_resuming_from_the_hub_ends_in_the_same_bits(self, keras, tmp_path, kind):
        if kind == "recurrent" or (keras not in KERAS3 and kind in self.TOLD):
            readme = (HERE / "README.md").read_text("utf-8")
            assert kind in readme.partition(" resuming\n")[2].partition("\n## ")[0]
            return

        def make():
            if kind == "new process":
                keras.backend.clear_session()  # names begin anew
            keras.utils.set_random_seed(7)
            keras.mixed_precision.set_global_policy(kind if "mixed" in kind else "float32")
            layers = [keras.layers.Input((4,)), keras.layers.Dense(4)]
            layers += [getattr(keras.layers, kind)(0.5)] if kind in self.TOLD[1:] else []
            model = keras.Sequential([*layers, keras.layers.Dense(3, "softmax")])
            average = {"use_ema": True, "ema_momentum": 0.5} if kind == "average" else {}
            optimizer = keras.optimizers.Adam(0.1, **average)
            if kind == "legacy" and keras not in KERAS3:
                optimizer = keras.optimizers.legacy.Adam(0.1)
            model.compile("nadam" if kind == "Nadam" else optimizer, LOSS)  # and a loss scale
            keras.mixed_precision.set_global_policy("float32")
            model.layers[0].trainable = kind != "frozen"  # after compile
            return model

        def fit(model, callbacks=(), **options):
            halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
            fit_in_order(model, callbacks=[halve, *callbacks], **options)
        zero = lambda logs: end.model.set_weights([0 * w for w in end.model.get_weights()])
        end = keras.callbacks.LambdaCallback(on_train_end=zero if "other" in kind else None)
        assert_resumes(make, tmp_path, fit, callbacks=[end])

    def test_the_table_of_the_card_goes_on_where_it_stood(self, push, model):
        resumed = small_model(FIRST)
        fit_in_order(model, epochs=2, callbacks=[push])
        load_repo_checkpoint(resumed, push.output_dir)
        fit_in_order(resumed, initial_epoch=2, epochs=4, callbacks=[push])
        assert rows_of(pushed(push)["README.md"].decode()) == [0, 1, 2, 3]


def rewritten(archive, **changes):
    """Rewrites members of a checkpoint, arrays or text; None removes one."""
    with zipfile.ZipFile(archive) as file:
        members = {name.removesuffix(".npy"): file.read(name) for name in file.namelist()}
    for name, change in changes.items():
        buffer = io.BytesIO()
        np.save(buffer, change)
        members[name] = buffer.getvalue() if isinstance(change, np.ndarray) else change
    with zipfile.ZipFile(archive, "w") as file:
        for name in [name for name in members if members[name] is not None]:
            file.writestr(name if name == "state.json" else f"{name}.npy", members[name])


def restated(archive, **changes):
    """Changes the state that a checkpoint holds beside its arrays."""
    with np.load(archive) as members:
        state = {**json.loads(members["state.json"]), **changes}
    rewritten(archive, **{"state.json": json.dumps(state)})


class Trap:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return exec, ("import os; os.environ['UNPICKLED'] = 'yes'",)


class TestUntrustedCheckpoint:
    JSONS = ["", "[0]", "{}", '{"history": {"0": ', b"\xff\xfe\x00"]
    HISTORIES = [{}, [1, 2], {"-1": {}}, {"x": {}}, {"0.5": {}}, {"0": 1}, None]
    DAMAGES = {
        "an archive cut in half": lambda npz: os.truncate(npz, npz.stat().st_size // 2),
        "an archive cut at its end": lambda npz: os.truncate(npz, npz.stat().st_size - 30),
        "a flipped byte": lambda npz: npz.write_bytes(
            npz.read_bytes()[:400] + bytes([npz.read_bytes()[400] ^ 255]) + npz.read_bytes()[401:]
        ),
        "no archive": lambda npz: npz.write_bytes(b""),
        "a pickle": lambda npz: npz.write_bytes(pickle.dumps(Trap())),
        "a pickle inside": lambda npz: rewritten(npz, **{"model.0": np.array([Trap()])}),
        "another format's beginning": lambda npz: npz.write_bytes(b"\x93NUMPY"),
        "a variable too few": lambda npz: rewritten(npz, **{"model.1": None}),
        "a variable too many": lambda npz: rewritten(npz, **{"model.2": np.zeros(1)}),
        "another shape": lambda npz: rewritten(npz, **{"model.1": np.zeros(4, "f4")}),
        "another dtype": lambda npz: rewritten(npz, **{"model.1": np.zeros(3, "i4")}),
        "no state": lambda npz: rewritten(npz, **{"state.json": None}),
        **{f"the state {json}": lambda npz, json=json: rewritten(npz, **{"state.json": json})
           for json in JSONS},
        **{f"the history {rows}": lambda npz, rows=rows: restated(npz, history=rows)
           for rows in HISTORIES},
        "no names": lambda npz: restated(npz, names=None),
        "no optimizers": lambda npz: restated(npz, optimizers=[]),
    }  # fmt: skip

    @pytest.fixture
    def checkpoint(self, push, model):
        saved(push)
        return push.output_dir / "checkpoint" / "state.npz"

    def refuse(self, model, folder, error=ValueError):
        before = [np.copy(weight) for weight in model.get_weights()]
        with pytest.raises(error):
            load_repo_checkpoint(model, folder)
        assert_equal(model.get_weights(), before)

    @each("damage", DAMAGES.values(), ids=DAMAGES.keys())
    def test_a_damaged_checkpoint_is_refused_before_a_weight_changes(self, checkpoint, damage):
        damage(checkpoint)
        self.refuse(small_model(FIRST), checkpoint.parents[1])
        assert "UNPICKLED" not in os.environ

    def test_the_undamaged_one_is_accepted(self, checkpoint, model):
        other = small_model(FIRST)
        assert load_repo_checkpoint(other, checkpoint.parents[1]) == {"epoch": 0}
        assert_equal(state_of(other), state_of(model))

    @each("optimizer, sizes", [("sgd", [3]), ("adamax", [3]), (None, [3]), ("adam", [4, 3])])
    def test_another_optimizer_or_model_is_refused(self, checkpoint, optimizer, sizes):
        dense = [FIRST.layers.Dense(size) for size in sizes]
        other = FIRST.Sequential([FIRST.layers.Input((4,)), *dense])
        if optimizer is not None:
            other.compile(optimizer, "mse")
        self.refuse(other, checkpoint.parents[1])

    def test_text_in_the_history_neither_reaches_nor_prevents_the_card(self, push, checkpoint):
        text, resumed = {"0": {"loss": "x\n---\n<script>", "note\n# |": 1.5}}, small_model(FIRST)
        restated(checkpoint, history=text)
        assert load_repo_checkpoint(resumed, checkpoint.parents[1]) == {"epoch": 0}
        fit_in_order(resumed, initial_epoch=1, epochs=2, callbacks=[push])
        card = pushed(push)["README.md"].decode()
        assert rows_of(card) == [0, 1]
        assert "<script>" not in card and "\n# |" not in card

    def test_a_folder_without_a_checkpoint_is_refused(self, tmp_path):
        self.refuse(small_model(FIRST), tmp_path, FileNotFoundError)


def apart(keras, kind):
    """A model of the layers `left` and `right`; `kind` says where its optimizers are."""
    g, d = keras.optimizers.Adam(0.1), keras.optimizers.RMSprop(0.01)

    class Apart(keras.Model):  # without a call of its own
        def training(self):
            """The optimizers, each with what it trains."""
            if kind == "late":
                self.late = g
            if kind.startswith("in "):
                return [(g, self.left), (d, self.right)]
            return [(g, self if kind == "of all" else self.right)]

        def train_step(self, data):
            for optimizer, layer in self.training():
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(self.right(self.left(data[0])) - 1.0))
                gradients = tape.gradient(loss, layer.trainable_variables)
                optimizer.apply_gradients(zip(gradients, layer.trainable_variables))
            return {"loss": loss}
    keras.utils.set_random_seed(7)
    model = Apart()
    model.left = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4)])
    model.right = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3)])
    if kind == "in private attributes":
        model._g, model._d = g, d
    elif kind == "in a list in a dict":
        model.both = {"g": g, "d": [d]}
    elif kind == "in a model in it":
        model.left.g, model.left.d = g, d
    default = {"optimizer": g} if kind in ("of a part", "of all") else {}
    if kind == "in a list in a dict" and keras in KERAS3:  # Keras 2 compiles none without one
        default = {"optimizer": None}
    model.compile(**default)
    return model


class TestResuming:
    PLACES = ["in private attributes", "in a list in a dict", "in a model in it"]

    @ON_TF
    @each("kind", [*PLACES, "of a part", "of all"])
    @pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built")
    def test_whatever_trains_what_comes_back(self, keras, tmp_path, kind):
        assert_resumes(lambda: apart(keras, kind), tmp_path)

    @ON_TF
    @pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built")
    def test_where_that_cannot_be_known_one_training_step_tells(self, keras, tmp_path):
        def refuse_then_step(model):
            before = model.get_weights()
            with pytest.raises(ValueError, match="one training step"):
                load_repo_checkpoint(model, "user/half", token=WRITE)
            assert_equal(model.get_weights(), before)
            model.fit(X[:8], Y[:8], verbose=0)
        assert_resumes(lambda: apart(keras, "late"), tmp_path, before_loading=refuse_then_step)

    def test_names_decide_which_variable_is_which(self, keras, tmp_path):
        def make(names):
            inputs = keras.layers.Input((4,))
            outputs = [keras.layers.Dense(4, name=name)(inputs) for name in names]
            model = keras.Model(inputs, outputs)
            model.compile("adam", ["mse", "mse"])
            return model
        first, second, push = make("ab"), make("ba"), pushing(tmp_path, checkpoint=True)
        first.fit(X, [X, X], verbose=0, callbacks=[push])
        load_repo_checkpoint(second, push.output_dir)
        for model in (first, second):
            model.fit(X, [X, X], shuffle=False, verbose=0)
        for name in "ab":
            assert_equal(*(model.get_layer(name).get_weights() for model in (first, second)))


class TestWhichCheckpoint:
    def test_one_in_the_cache_is_loaded_only_for_who_is_offline_by_choice(
            self, push, model, monkeypatch, clock, caplog):
        name, constants, other = push.hub_model_id, huggingface_hub.constants, small_model(FIRST)
        saved(push)
        assert load_repo_checkpoint(other, name, token=WRITE) == {"epoch": 0}
        cached = hub.repos[name][-1]["oid"]
        fit_in_order(model, initial_epoch=1, epochs=2, callbacks=[push])
        before = state_of(other)
        hub.add_fault("info", 503, times=1000)
        with pytest.raises(huggingface_hub.utils.HfHubHTTPError, match="503"):
            load_repo_checkpoint(other, name, token=WRITE)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
        with pytest.raises(ConnectionError, match="127.0.0.1:9"):
            load_repo_checkpoint(other, name, token=WRITE)
        assert_equal(state_of(other), before)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load_repo_checkpoint(other, name, token=WRITE) == {"epoch": 0}
        assert cached[:7] in caplog.text

    @each("path", ["./nosuch", "../no/such/one", "nosuch/", "/no/such/one"])
    def test_a_path_that_does_not_exist_is_said_to(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="nosuch|no/such"):
            load_repo_checkpoint(small_model(FIRST), path)

    @each("place", ["the same folder", "another folder"])
    def test_a_stale_one_is_neither_pushed_nor_loaded(self, push, model, repo, place):
        saved(push)
        folder = push.output_dir if "same" in place else push.output_dir.parent / "elsewhere"
        options = {"hub_model_id": repo, "hub_token": WRITE}
        fit_in_order(model, callbacks=[PushToHubCallback(folder, save_strategy="no", **options)])
        assert not pushed(push).keys() & {"checkpoint/state.npz", "checkpoint/stale.npz"}
        with pytest.raises(FileNotFoundError):
            load_repo_checkpoint(small_model(FIRST), push.hub_model_id, token=WRITE)
        with pytest.raises(FileNotFoundError, match="older than the model"):
            load_repo_checkpoint(small_model(FIRST), folder)
        assert (folder / "checkpoint" / "stale.npz").exists() is (place == "the same folder")
        fit_in_order(model, callbacks=[PushToHubCallback(folder, checkpoint=True, **options)])
        for source in (folder, push.hub_model_id):
            other = small_model(FIRST)
            assert load_repo_checkpoint(other, source, token=WRITE) == {"epoch": 0}
            assert_equal(other.get_weights(), model.get_weights())

    def test_the_error_names_a_file_that_is_damaged_or_may_not_be_read(self, push, model):
        saved(push)
        user, name = os.geteuid(), "checkpoint/state.npz"
        with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to others
            shutil.copytree(push.output_dir, folder, dirs_exist_ok=True)
            os.chmod(folder, 0o755)
            os.chmod(f"{folder}/{name}", 0)
            os.seteuid(user or 65534)  # root may read everything
            try:
                with pytest.raises(PermissionError, match=name):
                    load_repo_checkpoint(model, folder)
            finally:
                os.seteuid(user)
        (push.output_dir / name).write_bytes(b"[0]")
        with pytest.raises(ValueError, match=name):
            load_repo_checkpoint(model, push.output_dir)

    def test_a_lack_of_memory_is_no_damage(self, push, model, monkeypatch):
        saved(push)
        monkeypatch.setattr("zipfile.ZipFile.open", raising(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            load_repo_checkpoint(model, push.output_dir)


# Model card ----------------------------------------------------------------------------------


def card_on_hub(push, index=-1):
    return huggingface_hub.ModelCard(hub.files(push.hub_model_id, index)["README.md"].decode())


def card_of(folder, model, *epochs, **facts):
    """The card after epochs with these logs."""
    push = pushing(folder, **facts)
    begin(push, model, epochs=len(epochs), steps=3)
    for epoch, logs in enumerate(epochs):  # results are of the first epoch that has these weights
        model.set_weights([weight + 1 for weight in model.get_weights()])
        push.on_epoch_end(epoch, logs)
    push.on_train_end()
    return card_on_hub(push)


class TestCard:
    FACTS = dict(language="en", license="mit", tags=["vision", "a\n---\nb: <b>"])
    FACTS |= dict(finetuned_from="google/base", tasks="image-classification")
    FACTS |= dict(dataset="Digits | of\nUCI", dataset_tags="mnist", dataset_args="default")
    METRIC_TYPES = dict(val_accuracy="accuracy", val_sparse_categorical_accuracy="accuracy")
    METRIC_TYPES |= dict(rouge1="rouge", rougeL="rouge", sacrebleu="sacrebleu", val_mse="mse")
    METRIC_TYPES |= dict(f1_macro="f1", answer_f1="f1", val_interval_f1="f1")
    METRIC_TYPES |= dict(tower_score="tower_score")  # no word of it is "wer"

    def test_the_card_has_the_facts_the_metrics_by_the_hubs_names_and_the_optimizer(
            self, keras, tmp_path):
        schedule = keras.optimizers.schedules.PolynomialDecay(0.25, 1234)
        model = small_model(keras, keras.optimizers.Adam(schedule))
        fit_in_order(model)
        values = {name: len(name) / 8 for name in self.METRIC_TYPES}
        logs = {"loss": 0.5, "accuracy": 0.9, "val_loss": 0.7, "val_nan": math.nan, **values}
        card = card_of(tmp_path, model, {"loss": 1.0, "f1": 1.0}, logs, **self.FACTS)
        data = card.data
        assert data.library_name == ("keras" if keras in KERAS3 else "tf-keras")
        assert data.tags == ["vision", "a --- b: <b>", "generated_from_keras_callback"]
        assert (data.language, data.license, data.base_model) == (["en"], "mit", "google/base")
        assert (data.datasets, data.pipeline_tag) == (["mnist"], "image-classification")
        assert data.metrics == sorted(set(self.METRIC_TYPES.values()))
        results, first = data.eval_results, data.eval_results[0]
        assert {r.metric_name: r.metric_type for r in results} == self.METRIC_TYPES
        assert {r.metric_name: r.metric_value for r in results} == values
        assert (first.task_type, first.dataset_type) == ("image-classification", "mnist")
        assert (first.dataset_name, first.dataset_config) == ("Digits | of UCI", "default")
        config = json.loads(re.search(r"```json\n(.*?)```", card.text, re.DOTALL)[1])
        assert (config["class_name"], config["beta_1"]) == ("Adam", pytest.approx(0.9))
        assert config["learning_rate"]["config"]["decay_steps"] == 1234

    def test_the_table_has_every_epoch_and_all_columns(self, model, tmp_path):
        epochs = {"loss": 1.23456}, {"loss": math.nan, "val_loss": 0.00012346}
        card = card_of(tmp_path, model, *epochs, {"late|r": 7, "val_loss": math.inf})
        assert [line for line in card.text.splitlines() if line.startswith("| ")] == [
            "| Epoch | loss | Validation loss | late\\|r |",
            "| ---: | ---: | ---: | ---: |",
            "| 0 | 1.235 |  |  |",
            "| 1 | nan | 0.0001235 |  |",
            "| 2 |  | inf | 7 |",
        ]

    @each("facts, field, expected", [
        ({"finetuned_from": "/tmp/base"}, "base_model", None),
        ({"finetuned_from": "bert-base-cased"}, "base_model", "bert-base-cased"),
        ({"finetuned_from": "owner/base"}, "base_model", "owner/base"),
        ({"tasks": ["robotics"]}, "pipeline_tag", "robotics"),
        ({"tasks": ["fill-mask", "translation"]}, "pipeline_tag", None),
    ])
    def test_a_hub_name_is_the_base_model_and_the_one_task_the_pipeline_tag(
            self, model, tmp_path, monkeypatch, facts, field, expected):
        for name in ("bert-base-cased", "owner/base"):  # folders of that name hide nothing
            (tmp_path / name).mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        card = card_of(tmp_path, model, {"loss": 1.0}, **facts)
        assert getattr(card.data, field) == expected
        assert facts.get("finetuned_from", "") in card.text

    @each("facts, message", [
        ({"license": 10**5000}, "No model card was written: ValueError"),  # that `str` refuses
        ({"tags": ["REFUSE"]}, "without the model card"),  # that the Hub refuses
    ], ids=["not generated", "refused"])
    def test_a_card_that_fails_blocks_nothing(self, model, tmp_path, caplog, facts, message):
        push = pushing(tmp_path, **facts)
        fit_in_order(model, callbacks=[push])
        assert "README.md" not in on_hub()
        assert (push.output_dir / "README.md").exists() is ("tags" in facts)
        assert message in caplog.text
        assert_pushed(push)


class TestCardOfAHuman:
    HUMAN = {"README.md": b"---\nlicense: mit\n---\n# By a human\n", "notes/mine.md": b"mine"}

    @each("edits_both", [False, True])
    def test_a_humans_local_card_stays_and_is_pushed_unless_one_is_on_the_hub(
            self, push, edits_both):
        saved(push)
        local = push.output_dir / "README.md"
        local.write_bytes(b"# Mine\n")
        if edits_both:
            hub.commit(push.hub_model_id, "By hand", self.HUMAN)
        for epoch in (1, 2):
            saved(push, epoch)
        push.on_train_end()
        assert local.read_bytes() == b"# Mine\n"
        expected = self.HUMAN["README.md"] if edits_both else b"# Mine\n"
        assert pushed(push)["README.md"] == expected

    @each("stage", ["info", "preupload", "lfs", "commit"])
    def test_what_a_human_changes_on_the_hub_during_an_upload_stays_through_all_later_saves(
            self, push, model, stage):
        saved(push)
        fit_in_order(model)
        fault = hub.add_fault(stage, "wait")
        push.on_epoch_end(1, {"loss": 0.1})
        assert fault.reached.wait(60)
        hub.commit(push.hub_model_id, "By hand", self.HUMAN)
        fault.release.set()
        push.last_job.result(timeout=60)
        saved(push, 2)
        push.on_train_end()
        assert pushed(push).items() >= self.HUMAN.items()
        assert_pushed(push)

    def test_what_a_human_adds_to_the_metadata_of_our_card_stays_through_all_later_saves(
            self, push):
        saved(push)
        card = pushed(push)["README.md"].replace(b"---\n", b"---\nthumbnail: mine.png\n", 1)
        hub.commit(push.hub_model_id, "By hand", {"README.md": card})
        for epoch in (1, 2):
            saved(push, epoch)
            assert b"\nthumbnail: mine.png\n" in pushed(push)["README.md"]
            assert rows_of(pushed(push)["README.md"].decode())[-1] == epoch

    @each("theirs, kept", [(b"---\nthumbnail: [\n---\n", False), (b"# Mine\n", True)])
    def test_broken_metadata_stop_no_push_and_ours_never_reach_a_humans_card(
            self, push, theirs, kept):
        saved(push)
        local = push.output_dir / "README.md"
        if kept:
            local.write_bytes(theirs)
        else:
            broken = theirs + pushed(push)["README.md"].split(b"---\n", 2)[2]
            hub.commit(push.hub_model_id, "By hand", {"README.md": broken})
        other = pushing(push.output_dir.parent, push.output_dir.name)
        begin(other, push.model)
        saved(other, 1)
        assert (pushed(push)["README.md"] == theirs) is kept
        assert b"thumbnail" not in pushed(push)["README.md"]


def run_loading_code(push, monkeypatch, **names):
    """Runs the Python of the card, with the user's own names in the module it imports them from."""
    code = re.search(r"```python\n(.*?)```", pushed(push)["README.md"].decode(), re.DOTALL)[1]
    module = types.ModuleType("your_code")
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, "your_code", module)
    found = {}
    exec(code, found)
    for name in names:
        assert re.search(rf"^from your_code import .*\b{name}\b", code, re.MULTILINE)
    return found["model"]


class TestCardIsTrue:
    FACTS = {"tasks": "image-classification", "dataset": "digits"}

    @BOTH
    def test_the_best_model_is_pushed_with_its_results_when_early_stopping_restores_it(
            self, keras, tmp_path, strategy):
        scores, weights = iter([0.5, 0.9, 0.1, 0.2]), []
        layers = [keras.layers.Dropout(0.1), keras.layers.Dense(1, trainable=False)]
        layers += [keras.layers.Dense(3, activation="softmax")]  # it alone tells the epochs apart
        model = keras.Sequential([keras.layers.Input((4,)), *layers])
        model.compile("adam", LOSS)
        push = pushing(tmp_path, save_strategy=strategy, **self.FACTS)
        callbacks = [
            KerasMetricCallback(lambda p, l: {"f1": next(scores)}, (X, Y), batch_size=8),
            at_epoch_end(lambda epoch: weights.append(model.get_weights()), keras),
            keras.callbacks.EarlyStopping(
                "f1", mode="max", patience=2 if strategy == "no" else 1, restore_best_weights=True
            ),
            push,
        ]
        fit_in_order(model, epochs=9, callbacks=callbacks)
        card = card_on_hub(push)
        assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [("f1", 0.9)]
        assert "After 2 epochs" in card.text
        assert_equal(load(keras, downloaded(push)).get_weights(), weights[1])

    @each("how", ["an average", "another callback", "in the middle of an epoch"])
    def test_weights_of_no_epoch_claim_no_results(self, keras, tmp_path, how):
        model = small_model(keras, keras.optimizers.Adam(0.1, use_ema=how == "an average"))
        step = 1 if how == "another callback" else 0
        add = lambda logs: model.set_weights([w + step for w in model.get_weights()])
        strategy = {"save_strategy": "steps", "save_steps": 5} if "middle" in how else {}
        push = pushing(tmp_path, **strategy, **self.FACTS)
        callbacks = [measuring([]), keras.callbacks.LambdaCallback(on_train_end=add), push]
        fit_in_order(model, epochs=2, callbacks=callbacks)
        card = card_on_hub(push, 1 if "middle" in how else -1)  # after batch 5; an epoch has three
        assert (card.data.eval_results, card.data.metrics) == (None, None)
        assert not re.search(r"After \d+ epoch", card.text)

    def test_the_epochs_of_earlier_fits_count_and_no_origin_is_made_up(self, push, model):
        for _ in range(3):
            fit_in_order(model, callbacks=[push])
        assert not re.search("After 1 epoch|scratch|fine-tuned", card_on_hub(push).text)

    @each("kind", ["nothing", "lambda", "all parts", "all parts and the model"])
    def test_the_code_loads_a_model_with_parts_of_ones_own(
            self, keras, tmp_path, monkeypatch, kind):
        def own_function(x):
            return x * 3

        def own_loss(labels, predictions):
            return keras.losses.sparse_categorical_crossentropy(labels, predictions) * 2
        bases = {"OwnModel": keras.Sequential, "OwnAdam": keras.optimizers.Adam}
        bases |= {"OwnMetric": keras.metrics.SparseCategoricalAccuracy}
        bases |= {"OwnRate": keras.optimizers.schedules.ExponentialDecay}
        bases |= {"OwnLayer": keras.layers.ReLU, "Registered": keras.layers.ReLU}
        own = {name: type(name, (base,), {}) for name, base in bases.items()}
        own["OwnModel"].save_pretrained = lambda self, folder: None  # of transformers it is not
        own |= {"own_function": own_function, "own_loss": own_loss}
        keras.saving.register_keras_serializable("tests")(own["Registered"])
        layers = [own["OwnLayer"](), own["Registered"](), keras.layers.Activation(own_function)]
        if kind in ("nothing", "lambda"):
            layers = [keras.layers.Lambda(lambda x: x * 2)] if kind == "lambda" else []
        make = own["OwnModel"] if "model" in kind else keras.Sequential
        model = make([keras.layers.Input((4,)), *layers, *small_model(keras).layers])
        model.compile("adam", LOSS)
        if "parts" in kind:
            optimizer = own["OwnAdam"](own["OwnRate"](0.1, 10, 0.9))
            model.compile(optimizer, own_loss, metrics=[own["OwnMetric"]()])
        push = pushing(tmp_path)
        fit_in_order(model, callbacks=[push])
        keras.saving.get_custom_objects().pop("tests>Registered")
        if "model" not in kind:
            del own["OwnModel"]
        loaded = run_loading_code(push, monkeypatch, **(own if "parts" in kind else {}))
        assert_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))

    def test_no_name_of_a_metric_costs_the_card(self, model, tmp_path, repo):
        names = ["a\nb", "a\n---\nb", '"f1"', "it's: # x", "", "\ud800", "f1"]
        push = pushing(tmp_path, repo, **self.FACTS)
        metrics = {name: n / 8 for n, name in enumerate(names)}
        measure = KerasMetricCallback(lambda p, l: metrics, (X, Y), batch_size=8)
        fit_in_order(model, callbacks=[measure, push])
        card = card_on_hub(push)
        assert [r.metric_value for r in card.data.eval_results] == list(metrics.values())
        assert rows_of(card.text) == [0]
        assert re.search(r"^\| Epoch \|.*\|\n\| ---: ", card.text, re.MULTILINE)
        assert "# " + repo.replace("_", "\\_") in card.text.splitlines()


@each("place", ["on the Hub", "in the folder"])
class TestCardOfOthers:
    THEIRS = (
        "---\nlicense: mit\n---\n\n<!-- This model card has been generated automatically according "
        "to the information Keras had access to. You should\nprobably proofread and complete it, "
        "then remove this comment. -->\n\n# earlier\n"
    )
    KEYS = "---\nlicense: apache-2.0\ntags:\n- mine\nextra_gated_prompt: ask me\n---\n"

    @staticmethod
    def push_over(card, place, folder, repo, **facts):
        """A callback for a place where this card is already."""
        hub.commit(f"user/{repo}", "initial commit", {})
        if place == "on the Hub":
            hub.commit(f"user/{repo}", "Create README.md", {"README.md": card.encode()})
        else:
            write_files(folder / repo, "README.md", text=card)
        return pushing(folder, repo, **facts)

    def test_the_card_that_transformers_generated_is_replaced(self, model, tmp_path, repo, place):
        push = self.push_over(self.THEIRS, place, tmp_path, repo)
        fit_in_order(model, callbacks=[push])
        assert "# earlier" not in card_on_hub(push).text
        assert "generated_from_keras_callback" in card_on_hub(push).data.tags

    @each("card", [KEYS, KEYS.replace("\n", "\r\n") + "\r\n\r\n", ""])
    def test_a_card_of_metadata_alone_gets_our_text_and_keeps_its_keys(
            self, model, tmp_path, repo, place, card):
        facts = {"license": "mit", **TestCardIsTrue.FACTS}
        push = self.push_over(card, place, tmp_path, repo, **facts)
        fit_in_order(model, epochs=2, callbacks=[push, awaiting(push)])
        for made in (card_on_hub(push, -2), card_on_hub(push)):
            assert made.data.license == ("apache-2.0" if card else "mit")
            assert made.data.to_dict().get("extra_gated_prompt") == ("ask me" if card else None)
            assert ("mine" in made.data.tags) is bool(card)
            assert made.data.pipeline_tag == "image-classification"
            assert rows_of(made.text)

    def test_who_is_kept_by_a_humans_card_from_ours_reads_so_once(
            self, model, tmp_path, repo, place, caplog):
        human = TestCardOfAHuman.HUMAN["README.md"]
        push = self.push_over(human.decode(), place, tmp_path, repo)
        caplog.clear()
        fit_in_order(model, epochs=3, callbacks=[push, awaiting(push)])
        assert pushed(push)["README.md"] == human
        ((level, message),) = logged(caplog)
        assert level == "WARNING" and re.search("README.md|card", message)


# Faults --------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while somebody waits for the next try."""

    def __init__(self):
        self.seconds, self.meanwhile = 0.0, lambda event: None
        self.waits = collections.Counter()  # seconds waited after so many requests for a commit

    def now(self):
        return self.seconds

    def wait(self, event, seconds):
        self.waits[asked("commit")] += seconds
        self.seconds += seconds
        self.meanwhile(event)


@pytest.fixture
def clock(monkeypatch):
    """A clock that costs nothing, with the waits and limits that the README tells."""
    for name, value in dict(FIRST_WAIT=1.0, BACKGROUND_SECONDS=60.0, FINAL_SECONDS=300.0).items():
        monkeypatch.setattr(kc, name, value)
    monkeypatch.setattr(kc, "_clock", Clock())
    return kc._clock


def raising(error):
    def fail(*args, **options):
        raise error
    return fail


def once_training_waits(action):
    """Calls the action, in a thread, when the main thread waits in on_train_end for something."""
    main, names = threading.main_thread().ident, [""]

    def run():
        while names[0] != "wait" or "on_train_end" not in names:
            threading.Event().wait(0.01)  # looks again
            frames = traceback.walk_stack(sys._current_frames()[main])
            names[:] = [frame.f_code.co_name for frame, _ in frames]
        action()
    threading.Thread(target=run, daemon=True).start()


def interrupt_once(event):
    """Presses Ctrl-C when the training waits and the event is set."""
    once_training_waits(lambda: event.wait(60) and os.kill(os.getpid(), signal.SIGINT))


def end(push, strategy):
    """Saves during training or at its end; returns what the push failed of, or None."""
    push.on_train_end() if strategy == "no" else push.on_epoch_end(0)
    return push.last_job.exception(timeout=60)


# The client itself waits a second before it repeats some of these, so there are fewer of them.
PASSING = {
    "info": (500, 503, 429, 408, "drop", "hang", "lost"),
    "preupload": (503, "hang"),
    "batch": (503, "hang"),
    "lfs": (503, "hang", 429, "drop"),
    "commit": (500, 503, 429, 408, "drop", "hang", "lost", 409, 412, 423, 425),
    "any": ("drop",),  # three times, as from a Hub that comes up again
}
REFUSALS = [("info", 404), ("preupload", 403), ("batch", 403), ("lfs", 403), ("lfs", 413)]
REFUSALS += [("commit", 401), ("commit", 413), ("commit", 429)]  # not today
LASTING = [("info", 500), ("preupload", 429), ("lfs", "hang"), ("commit", 503), ("commit", "drop")]
LASTING += [("any", "down")]


class TestFaults:
    @BOTH
    @each("stage, kind", [(s, kind) for s in PASSING for kind in PASSING[s]])
    def test_a_passing_fault_costs_a_save_nothing(self, push, monkeypatch, stage, kind, strategy):
        monkeypatch.setattr(kc, "ATTEMPT_SECONDS", 0.5 if kind == "hang" else 20.0)
        fault = hub.add_fault(stage, kind, times=3 if stage == "any" else 1)
        assert end(push, strategy) is None
        assert fault.reached.is_set() and fault.times == 0
        message = "End of training" if strategy == "no" else "Training in progress, epoch 0"
        assert commits(push)[0] == message
        assert_pushed(push)
        assert_loads_back(push.output_dir, push.model)

    @BOTH
    @each("stage, kind", REFUSALS + LASTING)
    def test_a_refusal_at_once_and_a_fault_that_lasts_cost_one_line_in_the_log_and_this_push_only(
            self, model, tmp_path, repo, caplog, monkeypatch, stage, kind, strategy):
        push = pushing(tmp_path, repo)
        begin(push, model)
        for name in ("BACKGROUND_SECONDS", "FINAL_SECONDS"):
            monkeypatch.setattr(kc, name, 0.1)
        if kind == "hang" or (stage, kind) == ("preupload", 429):  # newer clients wait themselves
            monkeypatch.setattr(kc, "ATTEMPT_SECONDS", 0.3)
        hub.down, before = kind == "down", asked(stage)
        headers = {"Retry-After": "86400"} if kind == 429 else {}
        fault = hub.add_fault(stage, kind, times=1000, headers=headers)
        assert end(push, strategy) is not None
        ((level, message),) = logged(caplog)
        assert str(push.output_dir) in message
        assert not isinstance(kind, int) or str(kind) in message
        assert (stage, kind) not in REFUSALS or asked(stage) - before == 1
        if strategy == "no":
            command = rf"^(hf|huggingface-cli) upload {push.hub_model_id} "
            assert level == "ERROR" and "could not be pushed" in message
            assert re.search(command, message, re.MULTILINE)
        else:
            assert level == "WARNING" and "epoch 0" in message
        assert_loads_back(push.output_dir, push.model)
        hub.down, fault.times = False, 0
        saved(push, 1)
        assert commits(push) == ["Training in progress, epoch 1"]
        assert_pushed(push)

    def test_a_try_that_wakes_up_late_does_not_undo_the_newer_state(self, push, model, monkeypatch):
        monkeypatch.setattr(kc, "ATTEMPT_SECONDS", 0.5)
        late = hub.add_fault("commit", "wait")
        push.on_train_end()
        assert asked("commit") >= 2
        monkeypatch.setattr(kc, "ATTEMPT_SECONDS", 20.0)
        fit_in_order(model, callbacks=[push])
        before, answer, answered = commits(push), hub.answer, threading.Event()
        monkeypatch.setattr(hub, "answer", lambda *with_: (answer(*with_), answered.set()))
        late.release.set()
        assert answered.wait(60)
        assert commits(push) == before
        assert_pushed(push)

    @each("strategy, limit, longest", [("epoch", 60, 16), ("no", 300, 30)])
    def test_waits_double_with_jitter_up_to_half_a_minute_and_the_last_try_is_at_the_limit(
            self, push, clock, strategy, limit, longest):
        hub.add_fault("commit", 500, times=1000)
        clock.meanwhile = lambda event: clock.seconds > limit - 0.1 and hub.faults.clear()
        assert end(push, strategy) is None
        assert clock.seconds == pytest.approx(limit)
        factors = [clock.waits[tries] / 2 ** (tries - 1) for tries in (1, 2, 3, 4)]
        assert 1 <= min(factors) < max(factors) - 1e-6 and max(factors) <= 2
        assert longest <= max(clock.waits.values()) <= 2 * longest
        assert_pushed(push)

    @each("stage, status, seconds, form", [
        ("commit", 429, 7, "seconds"),
        ("commit", 503, 7, "seconds"),
        ("commit", 429, 200, "date"),
        ("preupload", 429, 3, "seconds"),  # where newer clients wait themselves
    ])
    def test_retry_after_is_honoured(self, push, clock, stage, status, seconds, form):
        date = email.utils.formatdate(time.time() + seconds + 1, usegmt=True)
        headers = {"Retry-After": date if form == "date" else str(seconds)}
        hub.add_fault(stage, status, headers=headers)
        begun = time.monotonic()
        push.on_train_end()
        assert seconds <= clock.seconds + time.monotonic() - begun < seconds + 20
        assert commits(push) == ["End of training"]

    def test_a_long_upload_has_all_its_tries_at_its_first_failure(self, push, monkeypatch, clock):
        route = hub.route

        def slow_route(*args):
            clock.seconds += 10 * kc.FINAL_SECONDS
            return route(*args)
        monkeypatch.setattr(hub, "route", slow_route)
        hub.add_fault("commit", 503)
        push.on_train_end()
        assert commits(push) == ["End of training"]

    @each("fault, error, match", [
        (("create", 503, 2), None, None),
        (("create", 403, 1000), huggingface_hub.utils.HfHubHTTPError, "403"),
        (None, ConnectionError, re.escape(f"{HUB_URL or hub.url}")),
    ], ids=["comes back", "refuses", "down"])
    def test_a_repository_is_created_by_a_hub_that_comes_back_or_the_error_names_it(
            self, tmp_path, clock, fault, error, match):
        hub.down = fault is None
        fault = fault and hub.add_fault(*fault)
        with pytest.raises(error, match=match) if error else contextlib.nullcontext():
            pushing(tmp_path)
        assert ("user/model" in hub.repos) is (error is None)
        assert (asked("create") == 1) is (match == "403")
        assert clock.seconds == 0 if match == "403" else 1 < clock.seconds < 60

    @each("stage, status", [("info", 401), ("commit", 403), ("lfs", 403)])
    def test_the_token_is_in_no_message_no_error_and_no_file(
            self, model, tmp_path, monkeypatch, caplog, capfd, stage, status):
        secret = "hf_secretSECRETsecret"
        monkeypatch.setattr(hub, "TOKENS", {secret: ("user", "write")})
        push = PushToHubCallback(tmp_path / "model", hub_token=secret, checkpoint=True)
        begin(push, model, verbose=1)
        hub.add_fault(stage, status, times=1000)
        errors = [end(push, "epoch"), end(push, "no")]
        hub.faults.clear()
        saved(push)
        with pytest.raises(Exception) as raised:
            load_repo_checkpoint(model, "user/nothing", token=secret)
        written = [caplog.text, *capfd.readouterr(), repr(push), str(vars(push))]
        written += ["".join(traceback.format_exception(e)) for e in (*errors, raised.value)]
        written += map(str, [*contents(tmp_path).values(), *on_hub().values(), hub.repos])
        assert all(errors)
        assert [str(status) in message for _, message in logged(caplog)] == [True, True]
        assert not [text for text in written if secret in text]


class Tokenizer:
    """Writes two files that tell its number, and between them does what it is told to."""

    def __init__(self, number=0):
        self.number, self.between = number, lambda: None

    def save_pretrained(self, folder):
        pathlib.Path(folder, "a_vocab.txt").write_text(str(self.number))
        self.between()
        pathlib.Path(folder, "b_vocab.txt").write_text(str(self.number))


class TestSavingFails:
    @pytest.fixture
    def push(self, push):
        push.tokenizer = Tokenizer()
        saved(push)
        return push

    @each("part, message", [
        ("the tokenizer", "OSError: the vocabulary is gone"),
        ("the model", ".*No space left"),
        (None, "Ctrl-C"),
    ])
    def test_what_cannot_be_written_is_named_and_the_save_before_stays(
            self, push, monkeypatch, part, message):
        before = contents(push.output_dir)
        with monkeypatch.context() as patch:
            if part == "the model":
                usage = types.SimpleNamespace(total=10**9, used=10**9 - 100, free=100)
                patch.setattr(shutil, "disk_usage", lambda path: usage)
            error = OSError("the vocabulary is gone") if part else KeyboardInterrupt(message)
            patch.setattr(push.tokenizer, "between", raising(error))
            match = rf"write {part} to .*{push.output_dir}: {message}" if part else message
            with pytest.raises(RuntimeError if part else KeyboardInterrupt, match=match):
                push.on_epoch_end(1, {})
        rescued = {"rescued_weights.npz"} if part else set()
        assert contents(push.output_dir).keys() - before.keys() == rescued
        assert contents(push.output_dir).items() >= before.items()
        saved(push, 2)
        push.on_train_end()
        assert_pushed(push)
        assert not leftovers(push.output_dir) and not rescued & pushed(push).keys()

    def test_the_state_of_the_optimizer_has_to_fit_on_the_disk_too(self, push, monkeypatch):
        layers = [FIRST.layers.Input((1000,)), FIRST.layers.Dense(1000)]  # of 4 MB, with Adam 12 MB
        model = FIRST.Sequential(layers)
        model.compile("adam", "mse")
        model.fit(np.zeros((1, 1000)), np.zeros((1, 1000)), verbose=0)
        begin(push, model)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2e7))
        with pytest.raises(RuntimeError, match="No space left"):
            push.on_epoch_end(1, {})

    @each("obstacle", ["nothing", "a file", "a folder inside"])
    def test_a_folder_that_is_gone_or_is_no_longer_one_is_named(self, push, obstacle):
        if obstacle == "a folder inside":
            (push.output_dir / "b_vocab.txt").unlink()
            (push.output_dir / "b_vocab.txt").mkdir()
        else:
            shutil.rmtree(push.output_dir)
        if obstacle == "a file":
            push.output_dir.write_text("in the way")
        before = contents(push.output_dir)
        with pytest.raises(RuntimeError, match=rf"Could not write .*{push.output_dir}"):
            push.on_epoch_end(1, {})
        assert contents(push.output_dir).items() >= before.items()

    @pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
    @BOTH
    def test_a_file_that_cannot_be_read_is_a_failed_push_only(self, push, caplog, strategy):
        odd = push.output_dir / "odd.bin"
        odd.symlink_to("/proc/self/mem")  # whose first byte nobody can read
        assert "Input/output error" in str(end(push, strategy))
        assert "Input/output error" in caplog.text
        assert_loads_back(push.output_dir, push.model)
        odd.unlink()
        assert end(push, strategy) is None


class TestPushingGoesOn:
    @each("path, end", [("modèle", "\n"), ("~/modèle", "\r\n"), ("./modèle", " ")])
    def test_neither_the_terminal_nor_the_working_folder_nor_the_end_of_the_token_matters(
            self, model, tmp_path, repo, monkeypatch, path, end):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        moving = FIRST.callbacks.LambdaCallback(on_train_begin=lambda logs: os.chdir("elsewhere"))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        push = PushToHubCallback(path, hub_model_id=repo, hub_token=WRITE + end)
        fit_in_order(model, verbose=2, callbacks=[moving, push])
        assert push.last_job.exception() is None
        assert_pushed(push)
        assert push.output_dir == tmp_path / "modèle"
        assert_loads_back(push.output_dir, model)
        assert not list((tmp_path / "elsewhere").iterdir())

    def test_a_remark_of_the_hub_on_a_card_fails_no_push(self, push):
        remark = {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        hub.add_fault("yaml", 200, times=1000, body=json.dumps(remark).encode())
        assert end(push, "no") is None  # warnings are errors here, as with `python -W error`
        assert_pushed(push)

    def test_an_ordinary_run_leaves_no_line_in_a_log_and_no_files(self, push, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
        fit_in_order(push.model, epochs=20, callbacks=[push])  # uploads end while saves begin
        push.on_train_end()  # what the Hub has already
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
        assert len(commits(push)) > 2
        assert not leftovers(push.output_dir)

    @each("name", ["my model", "a--b", "x" * 97, "model.git"])
    def test_a_name_that_the_hub_refuses_makes_no_folder(self, tmp_path, name):
        with pytest.raises(ValueError, match=re.escape(name)):
            pushing(tmp_path, name)
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second filesystem")
    def test_a_part_of_the_folder_may_lie_on_another_disk(self, push):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
            assert os.stat(other).st_dev != os.stat(push.output_dir).st_dev
            (push.output_dir / "checkpoint").symlink_to(other)
            saved(push)
            assert os.listdir(other) == ["state.npz"]
            assert load_repo_checkpoint(small_model(FIRST), push.output_dir) == {"epoch": 0}

    def test_a_lock_of_the_users_on_the_folder_is_not_waited_for(self, push):
        fcntl = pytest.importorskip("fcntl")
        held = os.open(push.output_dir, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        guard = threading.Timer(20, os.close, [held])
        guard.start()
        push.on_train_end()
        assert guard.is_alive()
        guard.cancel()
        os.close(held)

    @ON_TF  # layers of TensorFlow
    def test_no_estimate_stops_what_can_be_saved(self, keras, tmp_path):
        class Remembering(keras.layers.Layer):  # in a variable of unknown size
            def __init__(self, **options):
                super().__init__(**options)
                self.memory = tf.Variable(tf.ones((2, 4)), shape=(None, 4), trainable=False)

            def call(self, inputs):
                return inputs + tf.reduce_sum(self.memory)
        words = keras.layers.TextVectorization(output_sequence_length=4)
        x = tf.constant([f"a {'b ' * (i % 3)}" for i in range(22)])
        words.adapt(x)
        layers = [words, keras.layers.Embedding(9, 2), keras.layers.GlobalAveragePooling1D()]
        layers += [Remembering(), keras.layers.Dense(3, activation="softmax")]
        model, push = keras.Sequential(layers), pushing(tmp_path, checkpoint=True)
        model.compile("adam", LOSS)
        model.fit(x, Y, verbose=0, callbacks=[push])
        with keras.saving.custom_object_scope({"Remembering": Remembering}):
            loaded = load(keras, downloaded(push))
        assert_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))

    @each("pattern", ["*.h5\n*.keras", "model*", "*", "*.log"])
    def test_a_gitignore_may_keep_out_what_is_no_part_of_the_model(self, push, pattern, caplog):
        hub.commit(push.hub_model_id, "Create .gitignore", {".gitignore": pattern.encode()})
        (push.output_dir / "run.log").write_text("x")
        assert (end(push, "no") is None) is (pattern == "*.log")
        if pattern == "*.log":
            assert_pushed(push)
        else:
            assert ".gitignore" in logged(caplog)[-1][1]

    def test_a_name_that_is_no_text_is_left_out_with_a_warning(self, push, caplog):
        pathlib.Path(os.fsdecode(os.fsencode(push.output_dir) + b"/caf\xe9.txt")).write_text("x")
        assert end(push, "no") is None
        assert_pushed(push)
        assert "caf" in " ".join(message for _, message in logged(caplog))

    def test_training_in_a_thread_saves_in_the_same_format(self, keras, tmp_path):
        model, push = small_model(keras), pushing(tmp_path)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(fit_in_order, model, callbacks=[push]).result()
        assert_pushed(push, keras=keras, x=X)
        assert keras in KERAS3 or zipfile.is_zipfile(push.output_dir / "model.keras")

    def test_the_interpreter_exits_after_uploads_that_run_or_are_awaited_but_no_hopeless_ones(
            self, tmp_path, monkeypatch):
        code = f"""
import pathlib, threading, test_keras_callbacks as tests
tests.kc.FIRST_WAIT = tests.kc.LONGEST_WAIT = tests.kc.BACKGROUND_SECONDS = 1e5
model, folder = tests.small_model(tests.FIRST), pathlib.Path({str(tmp_path)!r})
model.optimizer.build(model.trainable_variables)
pushes = [tests.pushing(folder, name, checkpoint=True) for name in ("running", "hopeless", "final")]
for push in pushes:
    tests.begin(push, model)
for push in pushes[:2]:
    push.on_epoch_end(0)

def end():
    threading.main_thread().join()
    model.set_weights([weight + 1 for weight in model.get_weights()])  # both files differ
    push.on_train_end()
    print("all but one", flush=True)

push = pushes[2]
threading.Thread(target=end).start()
"""
        stages = {
            "running": "POST /user/running.git/info/lfs",
            "hopeless": "GET /api/models/user/hopeless",
            "final": "POST /api/models/user/final/commit",
        }
        monkeypatch.setattr(hub, "STAGES", {**stages, **hub.STAGES})
        running, hopeless = hub.add_fault("running", "wait"), hub.add_fault("hopeless", 503, 10**6)
        hub.add_fault("final", 503, headers={"Retry-After": "1"})
        with start_child(code) as child:
            try:
                assert running.reached.wait(60)
                assert "all but one\n" in iter(child.stdout.readline, "")
                running.release.set()
                assert child.wait(60) == 0
            finally:
                child.kill()
        assert hopeless.reached.is_set() and hub.commits("user/hopeless") == []
        assert asked("final") == 2 and hub.commits("user/final") == ["End of training"]
        assert sum(hub.is_lfs(name) for name in on_hub("running")) == 2
        assert assert_one_save(download(tmp_path / "downloaded", "running")) == 0


class TestLastStateWins:
    @each("older", ["an epoch's", "a final one of a callback that was interrupted"])
    def test_an_older_state_that_is_being_tried_again_makes_way_for_a_newer_one(
            self, push, model, repo, clock, older):
        waiting, newer = threading.Event(), push
        clock.meanwhile = lambda event: waiting.set() or event.wait(60)
        hub.add_fault("commit", 503)
        if older == "an epoch's":
            push.on_epoch_end(0)
            assert waiting.wait(60)
        else:
            interrupt_once(waiting)
            with pytest.raises(KeyboardInterrupt):
                push.on_train_end()
            newer = pushing(push.output_dir.parent, repo, save_strategy="no")
        job = push.last_job
        fit_in_order(model, callbacks=[newer])
        concurrent.futures.wait([job], 120)
        assert commits(push) == ["End of training"]
        assert_pushed(newer)

    def test_the_wait_for_an_upload_of_another_callback_is_announced_and_hurts_neither(
            self, push, model, repo, capfd):
        fault, said = hub.add_fault("lfs", "wait"), []
        push.on_epoch_end(0)
        assert fault.reached.wait(60)
        once_training_waits(lambda: (said.append(capfd.readouterr().out), fault.release.set()))
        other = pushing(push.output_dir.parent, repo)
        fit_in_order(model, verbose=2, callbacks=[other])
        assert push.hub_model_id in said[0]
        assert commits(push) == ["Training in progress, epoch 0", "End of training"]
        assert assert_one_save(downloaded(push, 1)) == 0
        assert_pushed(other)
        assert not leftovers(push.output_dir)

    @each("stage, name", [
        *itertools.product(["info", "preupload", "lfs"], [WEIGHTS, "README.md", "all files"]),
        ("commit", WEIGHTS),
        ("commit", "README.md"),
    ])
    def test_a_snapshot_that_is_changed_or_removed_is_neither_committed_torn_nor_called_pushed(
            self, push, caplog, stage, name):
        fault = hub.add_fault(stage, "wait")
        push.on_epoch_end(0, {"loss": 1.0})
        assert fault.reached.wait(60)
        if name == "all files":  # as `git clean -fdx` does
            (folder,) = (path for path in leftovers(push.output_dir) if path.is_dir())
            shutil.rmtree(folder)
        else:
            with (push.output_dir / name).open("r+b") as file:
                file.seek(900)
                file.write(b"torn" * 8)
        fault.release.set()
        failed = push.last_job.exception(timeout=60) is not None
        made = hub.repos[push.hub_model_id][1:]  # with the whole model, where it was sent by then
        assert all(WEIGHTS in commit["files"] for commit in made)
        assert b"torn" * 8 not in b"".join(b"".join(commit["files"].values()) for commit in made)
        assert (made or failed) and ("epoch 0" in caplog.text) is failed
        push.on_train_end()
        assert_pushed(push)


class TestWhatCannotBeSaved:
    @each("part, strategy", [
        ("layer", "epoch"), ("thing", "no"), ("schedule", "epoch"), ("loss", "no"),
    ])
    def test_is_refused_before_the_first_batch(self, keras, tmp_path, part, strategy):
        rate = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9)
        model, loss = small_model(keras), keras.losses.SparseCategoricalCrossentropy()
        stubborn = {"schedule": rate, "loss": loss}.get(part, model.layers[-1])
        stubborn.get_config = raising(NotImplementedError("no config of mine"))
        if part == "thing":
            stubborn.get_config = lambda: {"thing": threading.Lock()}
        model.compile(keras.optimizers.Adam(rate), loss)
        batches, push = [], pushing(tmp_path, save_strategy=strategy)
        count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda n, logs: batches.append(n))
        with pytest.raises(RuntimeError, match="(?i)config|serial|lock"):
            fit_in_order(model, callbacks=[count, push])
        assert batches == [] and contents(push.output_dir) == {}

    @BOTH
    def test_the_weights_are_rescued_when_a_save_fails(self, keras, tmp_path, strategy):
        model, other, fail = small_model(keras), small_model(keras), raising(NotImplementedError())
        turn = at_epoch_end(lambda epoch: setattr(model.layers[-1], "get_config", fail), keras)
        push = pushing(tmp_path, save_strategy=strategy)
        with pytest.raises(RuntimeError, match="rescued_weights.npz") as raised:
            fit_in_order(model, epochs=2, callbacks=[turn, push])
        path = push.output_dir / "rescued_weights.npz"
        assert str(path) in str(raised.value)
        with np.load(path) as arrays:
            other.set_weights(list(arrays.values()))
        assert_equal(other.get_weights(), model.get_weights())


class TestSlowUploads:
    @each("stage", ["info", "lfs", "commit"])
    def test_training_goes_on_and_each_commit_is_one_whole_save_the_newest(self, push, stage):
        fault, seen = hub.add_fault(stage, "wait"), []

        def look(epoch):
            seen.append([assert_one_save(push.output_dir), *commits(push)])
            if epoch == 3:
                fault.release.set()
                push.last_job.result(timeout=60)
                once_training_waits(hub.add_fault(stage, "wait").release.set)
        fit_in_order(push.model, epochs=6, callbacks=[push, at_epoch_end(look)])
        progress = [f"Training in progress, epoch {epoch}" for epoch in (0, 4)]
        assert seen == [[0], [1], [2], [3], [4, progress[0]], [5, progress[0]]]
        assert commits(push) == [*progress, "End of training"]
        assert [assert_one_save(downloaded(push, index)) for index in (1, 2, 3)] == [0, 4, 5]
        assert_pushed(push)


class TestInterrupts:
    @each("when", ["a callback fails", "Ctrl-C in training", "Ctrl-C in the wait at its end"])
    def test_an_interrupted_fit_leaves_the_folder_whole_and_the_callback_usable(
            self, push, model, caplog, when):
        error = ZeroDivisionError if when == "a callback fails" else KeyboardInterrupt
        stop = at_epoch_end(lambda epoch: epoch == 1 and raising(error)())
        fault, at_end = hub.add_fault("lfs", "wait"), when.endswith("end")
        if at_end:
            interrupt_once(fault.reached)
        with pytest.raises(error):
            fit_in_order(model, epochs=2, callbacks=[push] if at_end else [push, stop])
        told = re.search(rf"final state(.|\n)*upload {push.hub_model_id} ", caplog.text)
        assert (told is not None) is at_end
        assert assert_one_save(push.output_dir) == 1
        fault.release.set()
        push.last_job.result(timeout=60)
        assert commits(push) == ["Training in progress, epoch 0"]
        assert not leftovers(push.output_dir)
        fit_in_order(model, callbacks=[push])
        assert len(push.training_history) == 1
        assert_pushed(push)

    def test_a_final_push_whose_wait_was_interrupted_is_not_attempted_again(
            self, push, monkeypatch):
        monkeypatch.setattr(kc, "FINAL_SECONDS", 1e5)
        fault = hub.add_fault("info", 503, times=10**6)
        interrupt_once(fault.reached)
        with pytest.raises(KeyboardInterrupt):
            push.on_train_end()
        assert "503" in str(push.last_job.exception(timeout=60))
        assert not leftovers(push.output_dir)

    @each("place, error", [
        ((shutil, "copyfile"), KeyboardInterrupt),
        ((threading.Thread, "start"), KeyboardInterrupt),
        ((threading.Thread, "start"), RuntimeError),
    ])
    def test_an_upload_that_cannot_begin_does_not_hold_up_the_next_one(
            self, push, model, monkeypatch, caplog, place, error):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(*place, raising(error("can't start")))
            push.on_epoch_end(0)
            assert error is RuntimeError
            ((level, message),) = logged(caplog)
            assert level == "WARNING" and "can't start" in message
        fit_in_order(model, callbacks=[push])
        assert_pushed(push)
        assert not leftovers(push.output_dir)


def train_and_die(folder, run, ready=None, event="", pattern="", left=0):
    """Trains for two epochs, or until an audit event in the second save."""
    push = pushing(folder.parent, folder.name, checkpoint=True, tokenizer=Tokenizer(run))

    def watch(happening, args):
        nonlocal left
        left -= happening == event and bool(re.search(pattern, str(args)))
        if happening == event and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(epoch):
        if ready and ready.wait(60):
            sys.addaudithook(watch)
    fit_in_order(small_model(FIRST), epochs=2, callbacks=[push, at_epoch_end(arm)])


class TestKill:
    __test__ = BACKEND == "tensorflow" and hasattr(os, "fork")

    @each("event, pattern, number", [("open", r"README\.md'\)?, 'w", 1), ("os.rename", "", 3)],
          ids=["after the checkpoint is written", "before the third move"])
    def test_a_kill_while_saving_and_pushing_leaves_whole_files_and_the_next_run_finishes(
            self, tmp_path, repo, monkeypatch, event, pattern, number):
        monkeypatch.setenv("STAND_IN_HUB", hub.url)
        # Forks a process that has imported TensorFlow and made nothing of it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tensorflow", "keras", "tf_keras"])
        folder, ready, upload = tmp_path / repo, context.Event(), hub.add_fault("commit", "wait")
        arguments = (folder, 1, ready, event, pattern, number)
        killed = context.Process(target=train_and_die, args=arguments)
        killed.start()
        assert upload.reached.wait(60)
        ready.set()
        killed.join(180)
        assert killed.exitcode == -signal.SIGKILL
        upload.release.set()
        assert leftovers(folder)
        load(FIRST, folder)
        if event == "open":  # before the first move
            assert assert_one_save(folder) == 0
            assert load_repo_checkpoint(small_model(FIRST), folder) == {"epoch": 0}
        train_and_die(folder, 2)
        assert not leftovers(folder)
        assert assert_one_save(folder) == 1
        assert {(folder / f"{letter}_vocab.txt").read_text() for letter in "ab"} == {"2"}
        for index in range(1, len(hub.repos[f"user/{repo}"])):
            last = assert_one_save(download(tmp_path / str(index), repo, index))
        assert last == 1


# Ecosystems ----------------------------------------------------------------------------------

BERT, TOKENS = "TFBertForSequenceClassification", "TFBertForTokenClassification"
ANSWERS, IMAGES = "TFBertForQuestionAnswering", "TFViTForImageClassification"
GPT2, T5 = "TFGPT2LMHeadModel", "TFT5ForConditionalGeneration"
SPEECH, CAPTIONS = "TFWhisperForConditionalGeneration", "TFVisionEncoderDecoderModel"
BLIP = "TFBlipForConditionalGeneration"
# Of any model of transformers: a configuration leaves aside what it has no use for.
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
SIZES |= dict(encoder_layers=1, decoder_layers=1, decoder_attention_heads=2, num_decoder_layers=1)
SIZES |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, d_kv=8, d_ff=16, encoder_hidden_size=16)
SIZES |= dict(image_size=8, patch_size=4, num_channels=3, num_mel_bins=4)
SIZES |= dict(max_position_embeddings=32, max_source_positions=6, max_target_positions=32)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, sep_token_id=2)
SIZES |= dict(decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None)
SIZES |= dict(projection_dim=16, image_text_hidden_size=16, vocab_size=40, num_labels=40)
ENDS = {"max_new_tokens": 6, "eos_token_id": list(range(3, 40, 4))}  # so that lengths differ
LENGTHS = [(5, 3, 4), (7, 2), (4,)]  # of the examples in each batch: three widths, one alone


def tiny(kind, **options):
    """A small transformers model of random weights, large enough ones for its outputs to differ."""
    import transformers

    cls = getattr(transformers, kind) if isinstance(kind, str) else kind
    if kind == CAPTIONS:
        decoder = tiny(GPT2, add_cross_attention=True, is_decoder=True)
        return cls(encoder=tiny("TFViTModel"), decoder=decoder)
    is_blip = "Blip" in cls.__name__
    parts = dict(text_config=SIZES, vision_config=SIZES) if is_blip else {}
    model = cls(cls.config_class(**SIZES | parts | options))
    model.build_in_name_scope()
    rng, scale = np.random.default_rng(18), 0.8 if is_blip else 0.4
    model.set_weights([rng.normal(size=w.shape, scale=scale) for w in model.get_weights()])
    return model


def batches_for(kind, classes=0, labels=("labels",)):
    """Batches of what a model takes with labels: classes of the examples, or of their tokens.

    The mask alone tells what is no text: transformers would guess it from tokens that are 0.
    """
    rng, batches = np.random.default_rng(3), []
    for lengths in LENGTHS:
        spans, batch = np.arange(max(lengths)) < np.array(lengths)[:, None], {}
        mask = (spans[:, ::-1] if kind == GPT2 else spans).astype("int32")
        if kind not in (IMAGES, CAPTIONS, SPEECH):
            tokens = rng.integers(10, 40, mask.shape, "int32")
            batch.update(input_ids=np.where(mask, tokens, 9), attention_mask=mask)
        if kind in (IMAGES, CAPTIONS) or "Blip" in kind:
            batch["pixel_values"] = rng.normal(size=(len(mask), 3, 8, 8)).astype("float32")
        if kind == SPEECH:
            batch["input_features"] = rng.normal(size=(len(mask), 4, 12)).astype("float32")
        for name in labels:
            targets = np.where(mask, rng.integers(0, 40, mask.shape), -100)
            batch[name] = rng.integers(0, classes, len(mask)) if classes else targets
        batches.append(batch)
    return batches


def one_by_one(batches):
    """The examples of the batches, each as a batch of one, as wide as the batch it comes from."""
    return [
        tf.nest.map_structure(lambda column: column[index : index + 1], batch)
        for batch in batches
        for index in range(len(tf.nest.flatten(batch)[0]))
    ]


def without_labels(batch):
    return {name: column for name, column in batch.items() if name != "labels"}


TEXT, IMAGE = ["input_ids", "attention_mask"], ["pixel_values"]
GIVEN = {  # ways to give a batch to fit
    "pair": lambda x: (without_labels(x), x["labels"]),
    "pair with a tuple": lambda x: ((x["input_ids"], x["attention_mask"]), x["labels"]),
    "two texts": lambda x: (without_labels(x), {name: x[name][:, :2] for name in TEXT}),
    "dict": dict,
    "dict without labels": without_labels,
    "dict with a copy": lambda x: {**x, "labels": x["input_ids"]},
    "pair with a padded copy": lambda x: (
        without_labels(x), np.where(x["attention_mask"], x["input_ids"], -100)
    ),
}


def generated(model, data, options=ENDS, **more):
    return evaluate(model, data, predict_with_generate=True, generate_kwargs=options, **more)


@pytest.mark.filterwarnings("ignore:The initializer .* is unseeded and being called:UserWarning")
class TestTransformers:
    __test__ = has("transformers", "tf_keras", "datasets", "rouge_score")

    POSITIONS = {"start_positions": "start_logits", "end_positions": "end_logits"}
    PREDICTING = {  # a model, how many classes its examples have, how its data are given
        "sequence classification": (BERT, 3, "dict"),
        "token classification": (TOKENS, 0, "pair"),
        "question answering": (ANSWERS, 3, "dict"),
        "padded left": (GPT2, 0, "dict"),
        "images": (IMAGES, 3, "dict"),
        "decoder inputs from a column": (T5, 0, "dict"),
        "decoder inputs from the labels": (T5, 0, "pair"),
        "decoder inputs beside a tuple": (T5, 0, "pair with a tuple"),
    }

    @each("kind, classes, given", PREDICTING.values(), ids=PREDICTING)
    def test_predictions_equal_those_of_one_example_at_a_time(self, kind, classes, given):
        answers = self.POSITIONS if kind == ANSWERS else {"labels": "logits"}
        model = tiny(kind, **({"num_labels": 2} if kind == ANSWERS else {}))
        batches = batches_for(kind, classes, labels=answers)
        options = {"output_cols": ["logits"]} if kind == T5 else {}
        received = evaluate(model, as_pipeline([GIVEN[given](x) for x in batches]), **options)
        if len(answers) == 1:  # which arrives bare
            received = EvalPair({"logits": received.predictions}, {"labels": received.labels})
        assert list(received.predictions) == list(answers.values())
        assert list(received.labels) == list(answers)
        examples = one_by_one(batches)
        outputs = list(map(model, examples))
        for column, name in answers.items():
            logits, labels = received.predictions[name], received.labels[column]
            expected = padded([output[name].numpy()[0] for output in outputs])
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            targets = [example[column][0] for example in examples]
            np.testing.assert_array_equal(labels, targets if classes else padded(targets))
            assert (logits.dtype, labels.dtype) == (np.float32, np.int64)

    TOPICS = {"flowers": ["petal", "iris"], "medicine": ["tumor", "cell"]}
    LINES = [
        (" ".join(RNG.choice(words, size)), topic)
        for size, (topic, words) in itertools.product(range(3, 7), TOPICS.items())
    ]

    @pytest.fixture
    def tokenizer(self, tmp_path):
        """One token for each word."""
        import transformers
        words = sorted({word for line in self.LINES for word in " ".join(line).split()})
        vocabulary = tmp_path / "vocabulary"
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        names = ["input_ids", "attention_mask"]
        return transformers.BertTokenizerFast(str(vocabulary), model_input_names=names)

    @each("apart", [False, True], ids=["in one dict", "labels apart"])
    def test_pipelines_of_the_datasets_library_serve_as_they_come(self, apart, tokenizer):
        import datasets
        import transformers
        encoded = tokenizer([line for line, _ in self.LINES])
        topics = [int(topic == "medicine") for _, topic in self.LINES]
        data, model = datasets.Dataset.from_dict({**encoded, "labels": topics}), tiny(BERT)
        collate = transformers.DataCollatorWithPadding(tokenizer, return_tensors="np")
        options = dict(columns=data.column_names, batch_size=3, shuffle=False, collate_fn=collate)
        if apart:
            options |= dict(columns=list(encoded), label_cols="labels")
        predictions, labels = evaluate(model, data.to_tf_dataset(**options))
        expected = [model(np.array([ids])).logits.numpy()[0] for ids in encoded["input_ids"]]
        np.testing.assert_allclose(predictions, expected, atol=1e-4)
        np.testing.assert_array_equal(labels, topics)

    def test_the_rouge_recipe_of_the_readme_runs_as_it_stands_and_what_it_trains_loads_back(
            self, tokenizer, tmp_path):
        import datasets
        import transformers
        texts, topics = map(list, zip(*self.LINES))
        encoded = tokenizer(texts, text_target=topics, padding="max_length", max_length=16)
        model = tiny(T5, vocab_size=len(tokenizer), dropout_rate=0.0)
        model.set_weights([weight / 2 for weight in model.get_weights()])
        model.compile("adam")
        collate = transformers.DataCollatorForSeq2Seq(tokenizer, model, return_tensors="np")
        options = dict(batch_size=3, shuffle=False, drop_remainder=False, collate_fn=collate)
        data = model.prepare_tf_dataset(datasets.Dataset.from_dict(dict(encoded)), **options)
        given = dict(model=model, tokenizer=tokenizer, train_dataset=data, eval_dataset=data)
        names = run_readme_block("RougeScorer", tmp_path, **given)
        push = pushing(tmp_path, tokenizer=tokenizer)
        begin(push, model)
        push.on_train_end()
        folder, scores = downloaded(push), []
        loaded_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        loaded = getattr(transformers, T5).from_pretrained(folder)
        assert_equal(loaded.get_weights(), model.get_weights())
        for text, topic in self.LINES:
            inputs = loaded_tokenizer(text, return_tensors="tf")
            (tokens,) = loaded.generate(**inputs, max_new_tokens=16)
            answer = loaded_tokenizer.decode(tokens, skip_special_tokens=True)
            scores.append(names["scorer"].score(topic, answer))
        for name in ("rouge1", "rougeL"):
            expected = 100 * np.mean([score[name].fmeasure for score in scores])
            assert 0 < expected == pytest.approx(model.history.history[name][0])

    def test_training_resumes_bitwise(self, tmp_path):
        import transformers
        ids = np.random.default_rng(1).integers(5, 40, (16, 6), "int32")

        def make():
            model = tiny(BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            options = dict(num_warmup_steps=4, weight_decay_rate=0.1)
            optimizer, _ = transformers.create_optimizer(0.01, 16, **options)
            model.compile(optimizer)
            assert type(optimizer).__name__ == "AdamWeightDecay"
            return model

        def fit(model, **options):
            options |= dict(batch_size=4, shuffle=False, verbose=0)
            model.fit({"input_ids": ids}, ids.sum(1) % 2, **options)
        assert_resumes(make, tmp_path, fit)

    def test_the_code_of_the_card_loads_a_subclass_of_ones_own(self, tmp_path, monkeypatch):
        import transformers

        class OwnBert(transformers.TFBertForSequenceClassification):
            pass
        model, push, ids = tiny(OwnBert), pushing(tmp_path), np.array([[3, 4, 5]])
        begin(push, model)
        push.on_train_end()
        loaded = run_loading_code(push, monkeypatch, OwnBert=OwnBert)
        assert_equal(loaded(ids).logits, model(ids).logits)

    def test_settings_that_cannot_be_saved_are_refused_when_training_begins(self, tmp_path):
        model = tiny(GPT2)
        model.generation_config.temperature = 0.5  # only with do_sample, says save_pretrained
        with pytest.raises(RuntimeError, match="temperature"):
            begin(pushing(tmp_path, save_strategy="no"), model)


@pytest.mark.filterwarnings("ignore:The initializer .* is unseeded and being called:UserWarning")
class TestTransformersQuestions:
    """Against `generate` of one example at a time, called by name and eagerly."""

    __test__ = has("transformers", "tf_keras")

    QUESTIONS = {  # a model, the columns that it is to start from, how data are given, options
        "text": (T5, TEXT, "pair", {"output_cols": ["nosuch"]}),  # without effect on bare tokens
        "text padded left": (GPT2, TEXT, "dict", {}),
        "speech": (SPEECH, ["input_features"], "dict", {}),
        "images": (CAPTIONS, IMAGE, "dict", {}),
        "labels like the main input": (T5, TEXT, "dict with a copy", {}),
        "inputs in a tuple": (T5, TEXT, "pair with a tuple", {}),
        "two outputs of a tokenizer": (T5, TEXT, "two texts", {}),
        "two such by name": (T5, TEXT, "two texts", {"label_cols": TEXT}),
        "caption": (BLIP, IMAGE, "dict with a copy", {}),
        "caption apart": (BLIP, IMAGE, "pair with a padded copy", {}),
        "caption by name": (BLIP, IMAGE, "dict without labels", {"label_cols": "input_ids"}),
        "caption that goes on": (BLIP, IMAGE + TEXT, "dict", {}),
        "question about an image": ("TFBlipForQuestionAnswering", IMAGE + TEXT, "dict", {}),
    }

    @staticmethod
    @functools.cache
    def answers(kind, *asked):
        """A model, the settings of its generate, and the rows that each example alone gives."""
        model, settings = tiny(kind), {**ENDS, "pad_token_id": 0}
        if kind == CAPTIONS:
            settings["decoder_start_token_id"] = 1
        settings = {"max_new_tokens": 4} if "Blip" in kind else settings
        questions = [{name: x[name] for name in asked} for x in one_by_one(batches_for(kind))]
        rows = [model.generate(**question, **settings).numpy()[0] for question in questions]
        assert len({len(row) for row in rows}) > 1 or "Blip" in kind
        return model, settings, rows

    @each("kind, asked, given, options", QUESTIONS.values(), ids=QUESTIONS)
    def test_generation_starts_from_the_question_alone(self, kind, asked, given, options):
        model, settings, rows = self.answers(kind, *asked)
        data = as_pipeline([GIVEN[given](x) for x in batches_for(kind)])
        predictions, _ = generated(model, data, settings, **options)
        np.testing.assert_array_equal(predictions, padded(rows, 0))
        assert predictions.dtype == rows[0].dtype

    def test_sequences_scores_and_beam_indices_of_a_generation_arrive_together_or_as_chosen(self):
        model, batches = tiny(T5), batches_for(T5)
        options = dict(ENDS, num_beams=2, early_stopping=True, output_scores=True)
        options["return_dict_in_generate"] = True
        outputs = [model.generate(**without_labels(x), **options) for x in batches]
        received = generated(model, as_pipeline(batches), options).predictions
        for name, padding in {"sequences": 0, "beam_indices": -100}.items():
            rows = [row for output in outputs for row in output[name].numpy()]
            np.testing.assert_array_equal(received[name], padded(rows, padding))
            assert len(set(map(len, rows))) > 1
        rows = [row for output in outputs for row in np.stack(output.scores, 1)]
        assert len(set(map(len, rows))) > 1
        np.testing.assert_array_equal(np.stack(received["scores"], 1), padded(rows))
        chosen = generated(model, as_pipeline(batches), options, output_cols="sequences")
        np.testing.assert_array_equal(chosen.predictions, received["sequences"])

    @each("kind", [GPT2, SPEECH])
    def test_xla_compiles_once_for_all_batches_and_weights_and_follows_other_changes(self, kind):
        import transformers
        model, received, traces = tiny(kind, eos_token_id=None), [], []
        batch, generate = without_labels(batches_for(kind)[0]), model.generate
        model.generate = lambda *args, **options: traces.append(1) or generate(*args, **options)
        own = model.generation_config
        given = transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0)
        options = dict(predict_with_generate=True, use_xla_generation=True, batch_size=2)
        callback = measuring(received, (batch, np.zeros(3)), **options)  # batches of 2 and 1
        kwargs = callback.generate_kwargs
        turn = lambda: model.set_weights([weight[..., ::-1] for weight in model.get_weights()])
        changes = [  # what changes before an epoch, and whether that takes a compilation
            (lambda: own.update(max_new_tokens=3), True),
            (turn, False),
            (lambda: own.update(max_new_tokens=5), True),
            (lambda: kwargs.update(generation_config=given), True),
            (lambda: given.update(max_new_tokens=6), True),
            (lambda: (model.resize_token_embeddings(50), turn()), True),
        ]
        begin(callback, model)
        for change, compiles in changes if kind == GPT2 else changes[:2]:
            change()
            traces.clear()
            callback.on_epoch_end(0)
            expected = generate(**batch, **kwargs)
            np.testing.assert_array_equal(received[-1].predictions, expected)
            # Both models need autograph, which a first try finds out.
            assert len(traces) <= 2 and bool(traces) is compiles
        assert len({pair.predictions.tobytes() for pair in received}) == len(received)

    def test_a_class_that_equals_an_input_by_chance_is_no_answer(self):
        model, topic = tiny(GPT2), np.array([1, 2])
        model.call = lambda input_ids, topic: None  # its inputs go by these names
        model.generate = lambda input_ids, topic: input_ids * topic[:, None]
        inputs = {"input_ids": np.array([[3, 4], [5, 6]]), "topic": topic}
        received = generated(model, in_batches(inputs, topic), options={})
        np.testing.assert_array_equal(received.predictions, [[3, 4], [10, 12]])

    def test_xla_fills_a_batch_up_to_the_largest_of_its_own_width(self):
        model, shapes = tiny(GPT2), []
        model.generate = lambda input_ids: shapes.append(tuple(input_ids.shape)) or input_ids
        batches = [{"input_ids": np.ones(shape, "int32")} for shape in [(3, 4), (2, 9), (1, 9)]]
        options = dict(predict_with_generate=True, use_xla_generation=True, label_cols=[])
        assert evaluate(model, as_pipeline(batches), **options).predictions.shape == (6, 9)
        assert shapes == [(3, 4), (2, 9)]

    STOPS = {"eos_token_id": [36, 21]}  # the first text ends with 21, the others of its batch later
    PADDING = {  # generate_kwargs, what the model's own generation config says, the padding
        "nothing but an end": ({}, {}, 21),
        "ends": (STOPS, {}, 36),
        "ends of the model": ({}, STOPS, 36),
        "padding of the model": (STOPS, {"pad_token_id": 6}, 6),
        "a config given": ({"generation_config": STOPS}, {"pad_token_id": 6}, 36),
        "padding of one given": ({"generation_config": {**STOPS, "pad_token_id": 8}}, {}, 8),
        "both": ({"generation_config": {**STOPS, "pad_token_id": 8}, "pad_token_id": 9}, {}, 9),
    }

    @each("options, own, padding", PADDING.values(), ids=PADDING)
    def test_generated_tokens_are_padded_with_what_generate_pads_with(self, options, own, padding):
        import transformers
        model = tiny(GPT2, pad_token_id=None, eos_token_id=21)  # as the stock GPT2
        model.generation_config.update(**own)
        batches, options = batches_for(GPT2)[:2], {"max_new_tokens": 8, **options}
        if config := options.get("generation_config"):
            options["generation_config"] = transformers.GenerationConfig(**config)
        outputs = [model.generate(**without_labels(x), **options).numpy() for x in batches]
        rows = [row for output in outputs for row in output]
        received = generated(model, as_pipeline(batches), options).predictions
        np.testing.assert_array_equal(received, padded(rows, padding))
        assert rows[0][-1] == padding  # generate itself has padded with it

    @each("inputs, options, match", [
        ((np.zeros((2, 3), "i8"),) * 40, {}, "give them as a dict"),
        ({"attention_mask": np.ones((2, 3), "i8")}, {}, "'input_ids'"),
        (np.zeros((2, 3), "i8"), {"output_cols": ["nosuch"]}, "nosuch"),
    ], ids=["too many", "no question", "no such output"])
    def test_what_generate_cannot_do_is_refused_before_the_first_epoch(self, inputs, options, match):
        asked = dict(predict_with_generate=True, generate_kwargs={"return_dict_in_generate": True})
        metric = measuring([], (inputs, np.zeros(2)), batch_size=2, **asked, **options)
        with pytest.raises(ValueError, match=match):
            begin(metric, tiny(T5))


def train_recorded(keras, folder, name, scope=contextlib.nullcontext, callbacks=(), **options):
    """Trains for up to five epochs; writes what metric_fn received and the losses to `folder`."""
    received, data = [], tf.data.Dataset.from_tensor_slices((X, Y))
    with scope():  # each replica has averages of its own while it trains
        norm = keras.layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.layers.Input((4,)), norm, *small_model(keras).layers])
        model.compile("adam", LOSS)
    push = pushing(folder, "out", hub_model_id=name, **options)
    callbacks = [measuring(received, data.batch(7)), *callbacks, push]  # odd batches
    options = dict(steps_per_epoch=2, epochs=5, verbose=0, callbacks=callbacks)
    losses = model.fit(data.take(16).batch(8).repeat(), **options).history["loss"]
    np.savez(folder / "received.npz", losses=losses, **received[-1]._asdict())


def assert_measured_as_loaded(folder, loaded, epochs=5):
    """Asserts that metric_fn received what a model loaded from the Hub predicts, and the labels."""
    with np.load(folder / "received.npz") as received:
        assert len(received["losses"]) == epochs
        expected = loaded.predict(X, verbose=0)
        np.testing.assert_allclose(received["predictions"], expected, atol=1e-6)
        np.testing.assert_array_equal(received["labels"], Y)


# Devices and workers must be there before TensorFlow makes its first tensor, as this module does.
TWO_DEVICES = """
import pathlib, tensorflow as tf
processor = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
import test_keras_callbacks as tests
keras, folder = tests.lineages()[{lineage}], pathlib.Path({folder!r})
tests.train_recorded(keras, folder, "mirrored", strategy.scope)
def make():
    with strategy.scope():
        return tests.small_model(keras)
data = tests.in_batches(tests.X[:16], tests.Y[:16])
tests.assert_resumes(make, folder, lambda model, **options: model.fit(data, verbose=0, **options))
"""
TWO_WORKERS = """
import pathlib, tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
assert strategy.num_replicas_in_sync == 2
import test_keras_callbacks as tests
keras, folder = tests.lineages()[-1], pathlib.Path({folder!r})
stop = keras.callbacks.EarlyStopping("n", 10, 2, mode="max")  # after the third epoch
tests.train_recorded(keras, folder, "workers", strategy.scope, [stop], checkpoint=True)
"""
ON_JAX = """
import pathlib, jax, keras
if {processes!r}:
    keras.distribution.initialize(*{processes!r})
assert len(jax.devices()) == 2
keras.distribution.set_distribution(keras.distribution.DataParallel())
import test_keras_callbacks as tests
tests.train_recorded(keras, pathlib.Path({folder!r}), "parallel")
"""


class TestDistribution:
    __test__ = BACKEND == "tensorflow"

    def test_two_replicas_measure_and_push_what_one_device_predicts_and_resume_bitwise(
            self, keras, tmp_path):
        code = TWO_DEVICES.format(lineage=lineages().index(keras), folder=str(tmp_path))
        children((code, {}))
        assert_measured_as_loaded(tmp_path, load(keras, download(tmp_path / "d", "mirrored")))


class TestSeveralWorkers:
    __test__ = BACKEND == "tensorflow" and len(lineages()) > len(KERAS3)

    def test_all_measure_the_same_and_the_chief_alone_writes_and_commits(self, tmp_path):
        cluster, codes, folders = {"worker": free_addresses(2)}, [], (tmp_path / "0", tmp_path / "1")
        for index, folder in enumerate(folders):
            (folder / "scratch").mkdir(parents=True)
            task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
            environment = {"TF_CONFIG": json.dumps(task), "TMPDIR": str(folder / "scratch")}
            codes.append((TWO_WORKERS.format(folder=str(folder)), environment))
        children(*codes)
        loaded = load(lineages()[-1], download(tmp_path / "downloaded", "workers"))
        for folder in folders:
            assert_measured_as_loaded(folder, loaded, epochs=3)
        assert not [*(folders[1] / "out").iterdir(), *leftovers(folders[1] / "scratch")]
        names = {path.name for path in (folders[0] / "out").iterdir()}
        assert names == {"README.md", "checkpoint", "model.keras"}
        assert len(hub.commits("user/workers")) == asked("commit")
        assert load_repo_checkpoint(loaded, "user/workers", token=WRITE) == {"epoch": 2}


class TestJax:
    __test__ = BACKEND == "jax"

    @each("processes", [1, 2])
    def test_two_devices_measure_what_one_predicts_and_the_first_process_alone_commits(
            self, keras, tmp_path, processes):
        devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}"}
        addresses, codes = ",".join(free_addresses(processes)), []
        folders = [tmp_path / str(process) for process in range(processes)]
        for process, folder in enumerate(folders):
            folder.mkdir()
            given = [addresses, 2, process] if processes > 1 else []
            codes.append((ON_JAX.format(processes=given, folder=str(folder)), devices))
        children(*codes)
        loaded = keras.saving.load_model("hf://user/parallel")
        for folder in folders:
            assert_measured_as_loaded(folder, loaded)
        assert [list((folder / "out").iterdir()) for folder in folders[1:]] == [[]] * (processes - 1)
        assert len(hub.commits("user/parallel")) == asked("commit")


class TestJaxAsPredict:
    """What Keras' own fit and predict take on JAX."""

    __test__ = BACKEND == "jax"

    def test_sparse_inputs(self, keras):
        model, dense = small_model(keras), np.where(X > 0.5, X, 0)
        received = after_fit(model, in_batches(tf.sparse.from_dense(dense), Y)).predictions
        np.testing.assert_allclose(received, by_numpy(model, dense), rtol=1e-5, atol=1e-6)

    def test_ragged_inputs_are_padded_with_0(self, keras):
        layers = keras.layers.Embedding(12, 2), keras.layers.GlobalAveragePooling1D()
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        rows = tf.ragged.constant([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]])
        assert_as_predict(model, in_batches(rows, np.ones((5, 1)), size=2))

    @each("generates", [False, True], ids=["predict", "generate"])
    def test_none_among_the_inputs(self, keras, generates):
        def of_both(self, inputs):
            return inputs["a"] * 2 if inputs["b"] is None else inputs["b"]
        model = own_model(keras, call=of_both, generate=of_both)
        data = in_batches(X, X).map(lambda x, y: ({"a": x, "b": None}, y))
        received = after_fit(model, data, predict_with_generate=generates)
        np.testing.assert_array_equal(received.predictions, X * 2)

    def test_a_predict_step_gets_the_whole_element(self, keras):
        def predict_step(self, state, data):
            outputs, state = keras.Model.predict_step(self, state, data)
            return outputs + data[1], state
        assert_as_predict(own_model(keras, predict_step=predict_step), in_batches(X, TARGETS))

    @each("label_cols, labels", [(None, X), ("label", X * 2)])
    def test_a_column_that_serves_as_label_stays_an_input(self, keras, label_cols, labels):
        model = own_model(keras, call=lambda self, inputs: inputs["x"] + inputs["label"])
        data = in_batches({"x": X, "label": X * 2}, X)
        assert_equal(after_fit(model, data, label_cols=label_cols), EvalPair(X * 3, labels))


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
class TestKerasHub:
    __test__ = has("keras_hub")

    TEXTS = ["ab cd", "e", "fgh ab a", "j", "ab ab", "cab fad", "hid"]
    ENDS = TEXTS[::-1]
    WORDS = ["<s>", "<pad>", "</s>", "<|endoftext|>", "<unk>", "<mask>", *"Ġabcdefghij", "ab"]
    PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "##a", "##b", "##d"]
    SIZES = dict(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, dropout=0.0)
    SHORT = {"max_length": 9}

    def task(self, kind):
        """A small GPT2 or BART of random weights that generates greedily, or a BERT classifier."""
        import keras_hub
        cls = getattr(keras_hub.models, kind) if isinstance(kind, str) else kind
        words = {"vocabulary": {word: n for n, word in enumerate(self.WORDS)}, "merges": ["a b"]}
        lengths, head, sampler = {"sequence_length": 12}, {}, {"sampler": "greedy"}
        seed, scale = 0, 0.5  # so that texts differ
        if kind == "BartSeq2SeqLM":
            lengths = {"encoder_sequence_length": 10, "decoder_sequence_length": 12}
            seed, scale = 11, 2.0
        elif kind != "GPT2CausalLM":
            words = {"vocabulary": self.PIECES, "lowercase": True}
            head, sampler = dict(num_classes=3, dropout=0.0), {}
        tokenizer = cls.preprocessor_cls.tokenizer_cls(**words)
        sizes = dict(vocabulary_size=len(words["vocabulary"]), max_sequence_length=16, **self.SIZES)
        preprocessor = cls.preprocessor_cls(tokenizer, **lengths)
        model = cls(cls.backbone_cls(**sizes), preprocessor=preprocessor, **head)
        rng = np.random.default_rng(seed)
        model.set_weights([rng.normal(size=w.shape, scale=scale) for w in model.get_weights()])
        loss = FIRST.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, weighted_metrics=[], jit_compile=False, **sampler)
        return model

    def test_a_language_model_gives_the_text_of_one_example_at_a_time_and_loads_as_pushed(
            self, tmp_path, monkeypatch):
        model, push = self.task("GPT2CausalLM"), pushing(tmp_path)
        received = generated(model, in_batches(self.TEXTS, self.TEXTS, size=3), self.SHORT)
        expected = [model.generate(text, **self.SHORT) for text in self.TEXTS]
        assert len(set(expected)) > 3
        assert [column.tolist() for column in received] == [expected, self.TEXTS]
        begin(push, model)
        push.on_train_end()
        loaded = run_loading_code(push, monkeypatch)
        loaded.compile(sampler="greedy", jit_compile=False)
        assert loaded.generate(self.TEXTS, **self.SHORT) == expected

    PAIR, ANSWER = {"encoder_text": TEXTS, "decoder_text": ENDS}, {"decoder_text": ENDS}
    PAIRS = [{"encoder_text": [a], "decoder_text": [b]} for a, b in zip(TEXTS, ENDS)]
    QUESTIONS = {  # the data, the label column, what its encoder and decoder start from
        "a column of labels": (({**PAIR, "summary": ENDS},), "summary", PAIRS),
        "the text of the decoder": ((PAIR,), "decoder_text", [[text] for text in TEXTS]),
        "the same apart": ((PAIR, ANSWER), "decoder_text", [[text] for text in TEXTS]),
    }

    @each("data, label, asked", QUESTIONS.values(), ids=QUESTIONS)
    def test_an_encoder_decoder_generates_without_its_labels(self, data, label, asked):
        model = self.task("BartSeq2SeqLM")
        received = generated(model, in_batches(*data, size=3), self.SHORT, label_cols=label)
        expected = [model.generate(question, **self.SHORT)[0] for question in asked]
        assert received.predictions.tolist() == expected
        assert received.labels.tolist() == self.ENDS

    def test_an_encoder_decoder_predicts_from_both_texts(self):
        model, data = self.task("BartSeq2SeqLM"), in_batches(self.PAIR, size=3)
        received, _ = evaluate(model, data, label_cols="decoder_text")
        tokens, *_ = model.preprocessor(self.PAIR)
        np.testing.assert_allclose(received, model(tokens), rtol=1e-4, atol=1e-4)

    def test_without_a_preprocessor_tokens_go_in_and_come_out_in_a_dict(self):
        model, stop = self.task("GPT2CausalLM"), {"stop_token_ids": [10, 11, 12]}
        inputs = model.preprocessor.generate_preprocess(self.TEXTS)
        model.preprocessor = None
        received, _ = generated(model, in_batches(inputs, np.zeros(7), size=3), stop)
        inputs = {name: np.array(column) for name, column in inputs.items()}
        rows = [model.generate(row, **stop) for row in one_by_one([inputs])]
        tokens = np.concatenate([row["token_ids"] for row in rows])
        counts = np.concatenate([row["padding_mask"] for row in rows])  # which tokens count
        assert received.keys() == {"token_ids", "padding_mask"} and not counts.all()
        np.testing.assert_array_equal(received["padding_mask"], counts)
        np.testing.assert_array_equal(received["token_ids"][counts], tokens[counts])
        assert received["token_ids"].dtype == tokens.dtype

    def test_a_classifier_of_ones_own_is_trained_measured_pushed_and_loads_with_its_preprocessor(
            self, tmp_path, monkeypatch):
        import keras_hub

        @FIRST.saving.register_keras_serializable("tests")
        class OwnClassifier(keras_hub.models.BertTextClassifier):
            pass
        model, push, texts = self.task(OwnClassifier), pushing(tmp_path), np.array(self.TEXTS)
        received, data = [], in_batches(self.TEXTS, Y[:7], size=3)
        model.fit(data, verbose=0, callbacks=[measuring(received, data), push])
        loaded = run_loading_code(push, monkeypatch, OwnClassifier=OwnClassifier)
        expected = model.predict(texts, verbose=0)
        np.testing.assert_array_equal(loaded.predict(texts, verbose=0), expected)
        np.testing.assert_allclose(received[0].predictions, expected, atol=1e-6)
        np.testing.assert_array_equal(received[0].labels, Y[:7])
        assert received[0].predictions.dtype == np.float32

    def test_training_resumes_bitwise(self, tmp_path):
        data = in_batches(self.TEXTS, Y[:7], size=3)
        fit = lambda model, **options: model.fit(data, verbose=0, **options)
        assert_resumes(lambda: self.task("BertTextClassifier"), tmp_path, fit)

    def test_a_detector_is_measured_in_fit(self):
        from keras_hub import layers, models
        image = {"image_shape": (32, 32, 3)}
        convolutions = [64], [3], [64] * 3, [1] * 3, [1, 2, 2], "basic_block"
        encoder = models.ResNetBackbone(*convolutions, **image)
        backbone = models.RetinaNetBackbone(encoder, 3, 4, use_p5=False, **image)
        converter = layers.RetinaNetImageConverter((32, 32), bounding_box_format="yxyx")
        preprocessor = models.RetinaNetObjectDetectorPreprocessor(converter)
        model = models.RetinaNetObjectDetector(backbone, 3, preprocessor=preprocessor)
        model.compile("sgd", jit_compile=False)
        images = RNG.uniform(0, 255, (4, 32, 32, 3)).astype("float32")
        boxes = np.tile(np.float32([[2, 2, 12, 12]]), (4, 1, 1))
        labels = {"boxes": boxes, "labels": np.ones((4, 1), "float32")}
        data = in_batches(images, labels, size=2)
        assert_close(assert_as_predict(model, data).labels, labels)


class TestLegacySwitch:
    """The same module with TF_USE_LEGACY_KERAS=1, where tf.keras is tf_keras."""

    __test__ = has("tf_keras") and "TF_USE_LEGACY_KERAS" not in os.environ

    def test_metrics_logs_and_pushes_work_with_it(self):
        tests = "TestLogs or test_each_epoch or test_steps_are"
        command = [sys.executable, "-m", "pytest", "-q", "-k", tests, __file__]
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
        options = {"cwd": HERE, "env": environment, "capture_output": True, "text": True}
        run = subprocess.run(command, **options)
        assert run.returncode == 0, run.stdout[-3000:]
        assert " passed" in run.stdout


# Packaging and README ------------------------------------------------------------------------


README = (HERE / "README.md").read_text("utf-8")


def readme_block(text):
    """The block of Python in the README that holds this text."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = (block for block in blocks if text in block)
    return block


def run_readme_block(text, folder, **names):
    """Runs a block of the README as it stands, in an empty folder, logged in; returns its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", WRITE)
        exec(compile(readme_block(text), "README.md", "exec"), names)
    return names


class TestPackaging:
    METRIC = "metric_fn eval_dataset output_cols label_cols batch_size predict_with_generate"
    PUSH = "output_dir save_strategy save_steps tokenizer hub_model_id hub_token checkpoint"

    @each("function, names", [
        (KerasMetricCallback, METRIC + " use_xla_generation generate_kwargs"),
        (PushToHubCallback, PUSH + " model_card_args"),
        (load_repo_checkpoint, "model repo_path_or_name token"),
    ])
    def test_the_signatures_are_the_documented_ones(self, function, names):
        assert list(inspect.signature(function).parameters) == names.split()
        documented = re.findall(r"^ +\**(\w+): ", function.__doc__, re.MULTILINE)
        assert set(names.split()) <= set(documented)

    def test_package_and_readme_name_the_versions_of_the_module_and_of_tox(self):
        config = configparser.ConfigParser()
        config.read([HERE / "setup.cfg", HERE / "tox.ini"])
        assert config["metadata"]["version"] == "attr: keras_callbacks.__version__"
        assert re.fullmatch(r"\d+\.\d+\.\d+", kc.__version__)
        environments = set(config["tox"]["env_list"].split(", ")) - {"lint"}
        assert environments <= set(re.findall(r"`(\w+)`", README))
        table = README.partition("## What works with what")[2].partition("\n## ")[0]
        tried = re.findall(r"(?:>=|python)(\d+\.\d+)", (HERE / "tox.ini").read_text("utf-8"))
        assert set(re.findall(r" (\d+\.\d+)", table)) <= set(tried)


class TestReadme:
    __test__ = bool(KERAS3)  # the quickstart is about Keras 3

    def test_the_quickstart_loads_back_a_model_with_the_same_f1(self, tmp_path, capsys):
        assert len(readme_block("load_digits").splitlines()) <= 30
        FIRST.utils.set_random_seed(1)  # F1 differs by 0.04 among seeds
        names = run_readme_block("load_digits", tmp_path)
        last = float(re.search(r"F1 of the model loaded back: (.*)", capsys.readouterr().out)[1])
        assert names["history"].history["f1_macro"][-1] == pytest.approx(last)
        assert last > 0.9

    def test_the_block_about_resuming_runs(self, keras, tmp_path):
        given = dict(model=small_model(keras), train_dataset=in_batches(X, Y))
        names = run_readme_block("./resumable", tmp_path, **given)
        losses = [row["loss"] for row in names["push"].training_history]
        assert names["last"] == {"epoch": 1}
        assert losses == sorted(losses, reverse=True)


if __name__ == "__main__":  # runs the quickstart and shows what lies on the stand-in afterwards
    with tempfile.TemporaryDirectory() as folder:
        run_readme_block("load_digits", folder, __name__="__main__")
    print("Commits on the Hub:", hub.commits("user/digits"))
    for name, content in on_hub("digits").items():
        print(f"{len(content):9,d} bytes  {name}")
