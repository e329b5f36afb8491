"""Tests of keras_callbacks: real models, real `fit`, and the real huggingface_hub client.

The Hub is a stand-in: an HTTP server on loopback that keeps repositories in memory, checks what it
is sent as the real one does, and fails on demand. Helpers follow, then promises by subject.
"""

import base64
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import http.server
import importlib.util
import inspect
import io
import json
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

HERE = pathlib.Path(__file__).resolve().parent
# The stand-in Hub ----------------------------------------------------------------------------
class Hub:
    """Repositories in memory behind an HTTP server on loopback."""

    TOKENS = dict(hf_write=("user", "write"), hf_read=("user", "read"), hf_other=("other", "write"))
    STAGES = {"create": "POST /api/repos/create", "info": "GET /api/models/", "lfs": "PUT /lfs/"}
    STAGES |= {stage: f"POST /api/models/.*/{stage}/" for stage in ("preupload", "commit")}
    STAGES |= {"batch": "POST .*/info/lfs/objects/batch", "yaml": "POST /api/validate-yaml"}
    STAGES |= {"resolve": "(GET|HEAD) /.*/resolve/"}
    LFS = (".h5", ".keras")

    def __init__(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer takes 40 ms
            do_GET = do_HEAD = do_POST = do_PUT = lambda request: self.handle(request)
            log_message = lambda *args: None
        self.lock, self.count, self.faults = threading.RLock(), 0, []
        self.no_fault = self.add_fault("", None)
        self.reset()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *client: None  # one that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        for fault in self.faults:
            fault.release.set()
        self.repos, self.objects, self.faults, self.requests, self.down = {}, {}, [], [], False

    def add_fault(self, stage, kind, times=1, headers=(), of=""):
        """What happens instead of an answer to the next requests of a stage (and a repository)."""
        fault = types.SimpleNamespace(stage=stage, kind=kind, times=times, headers=headers, of=of)
        fault.reached, fault.release = threading.Event(), threading.Event()
        self.faults.append(fault)
        return fault

    def commits(self, repo_id):
        return [commit["message"] for commit in self.repos[repo_id]][1:]  # but the initial one

    def files(self, repo_id, index=-1):
        return self.repos[repo_id][index]["files"]

    def commit(self, repo_id, message, changes):
        with self.lock:
            history = self.repos.setdefault(repo_id, [])
            files = (history[-1]["files"] if history else {}) | changes
            self.count += 1  # no oid ever comes again: the client keeps what it has read by oid
            history.append({"oid": f"{self.count:040x}", "message": message, "files": files})
            return history[-1]["oid"]

    def handle(self, request):
        line = f"{request.command} {request.path}"
        stage = next((s for s, pattern in self.STAGES.items() if re.match(pattern, line)), "other")
        with self.lock:
            self.requests.append((stage, line))
            ready = [f for f in self.faults if f.stage in (stage, "any") and f.of in request.path]
            fault = next((f for f in ready if f.times > 0), self.no_fault)
            fault.times -= 1
        size = int(request.headers.get("Content-Length") or 0)
        is_dropped = self.down or fault.kind == "drop"  # in the middle of what is being sent
        body = request.rfile.read(min(10, size) if is_dropped else size)
        fault.reached.set()
        if fault.kind == "wait":  # answers once it is released
            fault.release.wait(120)
        status, content, headers = fault.kind, b"no", fault.headers
        if not isinstance(status, int) and not is_dropped:
            with self.lock:
                status, content, headers = (*self.route(request, body), {})[:3]
        with contextlib.suppress(OSError):
            if is_dropped or fault.kind == "lost":  # after the work is done
                request.close_connection = True
                return request.connection.shutdown(socket.SHUT_RDWR)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            request.send_response(status)
            for header in {"Content-Length": str(len(content)), **dict(headers)}.items():
                request.send_header(*header)
            request.end_headers()
            request.wfile.write(b"" if request.command == "HEAD" else content)

    def route(self, request, body):
        """Status, content and perhaps headers of the answer to a request."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        user, role = self.TOKENS.get(token, (None, None))
        if lfs := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != lfs[1]:
                return 400, {"error": "not what was announced"}
            self.objects[lfs[1]] = body
            return 200, b"", {"ETag": '"x"'}
        if user is None and (token or path == "/api/repos/create"):
            return 401, {"error": "Invalid credentials"}
        if path == "/api/validate-yaml":
            errors = [{"message": "bad card"}] if "REFUSE" in json.loads(body)["content"] else []
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or user}/{asked['name']}"
            answer = {"url": f"{self.url}/{repo_id}", "id": repo_id, "name": repo_id}
            if repo_id in self.repos:
                return 409, {"error": "You already created this model repo", **answer}
            if role != "write" or repo_id.split("/")[0] != user:
                return 403, {"error": "no right to create"}
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
                return self.route_commit(repo_id, history, [*map(json.loads, body.splitlines())])
            return self.route_upload(action, history[-1]["files"], json.loads(body))
        revision, _, name = rest.partition("/")
        commit = next((c for c in history if c["oid"] == revision), history[-1])
        files, headers = commit["files"], {"X-Repo-Commit": commit["oid"]}
        if action == "tree":
            found = [dict(path=n, size=len(c), oid=self.oid(c, n)) for n, c in files.items()]
            return 200, [{"type": "file", **file} for file in found]
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
                    item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            return 200, {"transfer": "basic", "objects": asked["objects"]}
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith(self.LFS) else "regular"
            file |= {"uploadMode": mode, "shouldIgnore": False}
            file["oid"] = self.oid(files.get(file["path"]), file["path"])
        return (200, asked) if len(asked["files"]) <= 256 else (400, {"error": "too many files"})

    def route_commit(self, repo_id, history, lines):
        values_of = lambda key: [line["value"] for line in lines if line["key"] == key]
        (header,), files, large = map(values_of, ("header", "file", "lfsFile"))
        if header.get("parentCommit") not in (None, history[-1]["oid"]):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        if not {file["oid"] for file in large} <= self.objects.keys():
            return 400, {"error": "LFS object is missing"}
        changes = {file["path"]: base64.b64decode(file["content"]) for file in files}
        changes |= {file["path"]: self.objects[file["oid"]] for file in large}
        oid = self.commit(repo_id, header["summary"], changes)
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}

    def oid(self, content, name):
        """The Hub's name of a content: git's hash, or the SHA-256 of an LFS file."""
        if content is None or name.endswith(self.LFS):
            return content and hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

# The client reads its settings when it is imported, so the stand-in starts first.
HUB_URL = os.environ.get("STAND_IN_HUB")  # a child process of a test uses its parent's
hub = None if HUB_URL else Hub()
HOME = tempfile.TemporaryDirectory()
os.environ.update(HF_ENDPOINT=HUB_URL or hub.url, HF_HOME=HOME.name, TF_CPP_MIN_LOG_LEVEL="3")
os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")  # it speaks LFS only
for variable in ("TOKEN", "HUB_TOKEN", "HUB_OFFLINE", "HUB_DISABLE_PROGRESS_BARS"):
    os.environ.pop(f"HF_{variable}", None)

import h5py
import huggingface_hub
import numpy as np
import pytest
import tensorflow as tf
import keras_callbacks as kc
from keras_callbacks import KerasMetricCallback, PushToHubCallback, load_repo_checkpoint

# Fixtures and helpers ------------------------------------------------------------------------
def has(*libraries):
    """Whether all these are installed; `__test__ = has(...)` says if a class is collected."""
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
def fresh_hub(monkeypatch):
    """An empty Hub, and short waits between tries; a test that is about them sets its own."""
    for name, seconds in dict(FIRST_WAIT=0.01, BACKGROUND_SECONDS=9.0, FINAL_SECONDS=60.0).items():
        monkeypatch.setattr(kc, name, seconds)
    yield
    hub.reset()

@pytest.fixture(scope="module")
def model():
    """One compiled model for the tests about the Hub: each fit goes on where the last one ended."""
    return fit_in_order(small_model(FIRST)).model

@pytest.fixture
def repo(tmp_path):
    return tmp_path.name  # so that a request left behind meets no other test's repository

@pytest.fixture
def push(tmp_path, repo, model):
    """A PushToHubCallback with a checkpoint whose hooks the test calls itself."""
    push = pushing(tmp_path, repo, checkpoint=True)
    model.set_weights([w + 0.01 for w in model.get_weights()])  # no request left behind has these
    begin(push, model)
    return push

def small_model(keras, optimizer="adam", policy="float32", **compile_args):
    """A classifier from 4 numbers to 3 classes, always with the same weights at first."""
    keras.utils.set_random_seed(7)
    keras.mixed_precision.set_global_policy(policy)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile(optimizer, LOSS, metrics=["accuracy"], **compile_args)
    keras.mixed_precision.set_global_policy("float32")
    return model
def by_numpy(model, x=X):
    """The predictions of small_model, written out."""
    kernel, bias = model.get_weights()
    exponentials = np.exp(x @ kernel + bias)
    return exponentials / exponentials.sum(-1, keepdims=True)
IN_ORDER = {"batch_size": 8, "shuffle": False, "verbose": 0}
fit_in_order = lambda model, **options: model.fit(X, Y, **IN_ORDER | options)
def begin(callback, model, **params):
    """Begins a training whose hooks the test calls itself."""
    callback.set_model(model)
    callback.set_params({"verbose": 0, "epochs": 1, **params})
    callback.on_train_begin()
def measuring(received, data=(X, Y), **options):
    """A KerasMetricCallback that appends what its metric_fn gets to a list."""
    metric_fn = lambda *pair: received.append(EvalPair(*pair)) or {"n": len(received)}
    return KerasMetricCallback(metric_fn, data, **{"batch_size": 8, **options})
def evaluate(model, dataset, metric_fn=None, logs=None, **options):
    """Runs one epoch's end of KerasMetricCallback; returns what metric_fn received."""
    callback = measuring(received := [], dataset, **{"batch_size": None, **options})
    if metric_fn is not None:
        callback = KerasMetricCallback(metric_fn, dataset, **options)
    begin(callback, model)
    callback.on_epoch_end(0, {} if logs is None else logs)
    return received[-1] if received else None
pushing = lambda folder, name="model", **o: PushToHubCallback(folder / name, hub_token=WRITE, **o)
def saved(push, epoch=0):
    """Ends an epoch and waits until its save is on the Hub, or raises what it failed of."""
    push.on_epoch_end(epoch, {"loss": 1 / (epoch + 1)})
    return push.last_job.result(timeout=60)
# To list after the one that pushes: calling the action with each epoch, and awaiting its save.
calling = lambda action: lambda epoch, logs: action(epoch)
at_epoch_end = lambda do, keras=FIRST: keras.callbacks.LambdaCallback(on_epoch_end=calling(do))
awaiting = lambda push, keras=FIRST: at_epoch_end(lambda n: push.last_job.result(60), keras)
# What the stand-in was asked for and holds, what a folder hides, a card's epochs, the log.
asked = lambda stage: sum(kind == stage for kind, _ in hub.requests)
on_hub = lambda name="model", index=-1: hub.files(f"user/{name}", index)
pushed = lambda push: hub.files(push.hub_model_id)
commits = lambda push: hub.commits(push.hub_model_id)
leftovers = lambda folder: list(folder.glob(".*"))
rows_of = lambda card: [int(epoch) for epoch in re.findall(r"^\| (\d+) \|", card, re.MULTILINE)]
logged = lambda log: [(r.levelname, r.message) for r in log.records if r.name == "keras_callbacks"]
def download(folder, name="model", index=-1):
    """Writes the files of a commit into a folder, as a user would download them, and returns it."""
    for path, content in on_hub(name, index).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder
def downloaded(push, index=-1):
    name = push.hub_model_id.split("/")[1]
    return download(push.output_dir.parent / f"{name} {index}", name, index)
def load(keras, folder):
    return keras.models.load_model(folder if keras in KERAS3 else folder / "model.keras")
def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
def state_of(model):
    """The values of the weights and of the variables of the optimizers that train them."""
    training = getattr(model, "training", lambda: [(model.optimizer, model)])
    owned = [own() if callable(own := optimizer.variables) else own for optimizer, _ in training()]
    return [*model.get_weights(), *(v.numpy() for variables in owned for v in variables)]
def assert_equal(received, expected):
    """Asserts that two nestings of arrays are the same bits."""
    for left, right in zip(tf.nest.flatten(received), tf.nest.flatten(expected), strict=True):
        np.testing.assert_array_equal(left, right)
def assert_close(received, expected):
    """Asserts that two nestings of arrays hold nearly the same values by the same names."""
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    tf.nest.map_structure(compare, received, expected, check_types=False)
def assert_pushed(push, keras=FIRST, x=None, folder=None):
    """Asserts that a folder, the newest commit by default, holds the model and loads back."""
    loaded = load(keras, folder or downloaded(push))
    assert_equal(loaded.get_weights(), push.model.get_weights())
    if x is not None:
        assert_equal(loaded.predict(x, verbose=0), push.model.predict(x, verbose=0))
def assert_one_save(folder):
    """Asserts that model, checkpoint and card are of one and the same save; returns its epoch."""
    resumed = small_model(FIRST)
    epoch = load_repo_checkpoint(resumed, folder)["epoch"]
    assert_equal(resumed.get_weights(), load(FIRST, folder).get_weights())
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
    assert load_repo_checkpoint(resumed, "user/half", token=WRITE) == {"epoch": 1}
    fit(resumed, initial_epoch=2, epochs=4)
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
slices = tf.data.Dataset.from_tensor_slices
in_batches = lambda *parts, size=8: slices(parts if parts[1:] else parts[0]).batch(size)
def children(*codes):
    """Runs pairs of code and environment variables in new processes at once, to their end."""
    common = {**os.environ, "STAND_IN_HUB": hub.url, "PYTHONPATH": str(HERE)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 180}
    run = lambda code, own: subprocess.run([sys.executable, "-c", code], env=common | own, **pipes)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for child in pool.map(run, *zip(*codes)):
            assert child.returncode == 0, child.stdout
def free_addresses(count):
    """Addresses on loopback that nobody listens at."""
    with contextlib.ExitStack() as stack:
        listen = lambda: stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return [f"127.0.0.1:{listen().getsockname()[1]}" for _ in range(count)]
def own_model(keras, *functional, **methods):
    """A compiled model, functional or with a dense layer, whose weights stay the same in `fit`."""
    def train_step(self, *of):  # (data), or on JAX (state, data)
        return {"loss": 0.0} if len(of) == 1 else ({"loss": 0.0}, of[0])
    keras.utils.set_random_seed(7)
    own = {} if functional else {"call": lambda self, inputs: self.dense(inputs)}
    model = type("Own", (keras.Model,), {**own, "train_step": train_step, **methods})(*functional)
    if not functional:
        model.dense = keras.layers.Dense(3)
        model.dense.build((None, 4))
    model.compile("sgd", "mse")
    return model
def after_fit(model, data, **options):
    """What metric_fn receives at the end of a `fit` of one epoch on the data that it evaluates."""
    callback = measuring(received := [], data, **{"batch_size": None, **options})
    model.fit(data, verbose=0, callbacks=[callback])
    return received[-1]
def assert_same(received, expected):
    """Asserts that two nestings of the same types hold nearly the same values, or the same None."""
    tf.nest.assert_same_structure(received, expected)
    leaves = map(tf.nest.flatten, (received, expected))
    assert_close(*([leaf for leaf in nest if leaf is not None] for nest in leaves))
def assert_as_predict(model, data, **options):
    """Asserts that metric_fn gets what Keras' own predict of the data gives; returns the pair."""
    received = after_fit(model, data, **options)
    assert_same(received.predictions, model.predict(data, verbose=0))
    return received
def assert_refused(model, data, *words, train=X, **options):
    """Asserts that `fit` raises a ValueError with these words before its first epoch begins."""
    callback = measuring(received := [], data, **options)
    callback.on_epoch_begin = lambda *of: received.append(of)
    with pytest.raises(ValueError) as caught:
        model.fit(train, LABEL, verbose=0, callbacks=[callback])
    assert [word for word in words if not re.search(word, str(caught.value))] == received == []

class TestMetricFn:
    @each("metric_fn", [
        lambda pair, tokenizer=None: {"l": sum(pair.label_ids), "p": pair.predictions.sum()},
        functools.partial(lambda pair, labels: {"l": sum(pair[1]), "p": pair[0].sum()}, labels=0),
        lambda p, labels=None: {"l": sum(labels), "p": p.sum()},
        lambda *both: {"l": sum(both[1]), "p": both[0].sum()},
    ], ids=["pair", "partial", "labels=None", "variadic"])
    def test_one_required_argument_gets_a_named_pair_and_more_get_two(self, metric_fn):
        evaluate(small_model(FIRST), (X, Y), metric_fn, logs := {}, batch_size=8)
        assert logs == {"l": Y.sum(), "p": pytest.approx(22, abs=1e-3)}  # of each row 1

    REFUSED = [(None, "None"), (0.5, "0.5"), ([("f1", 0.5)], "'f1', 0.5"), ({1: 0.5}, "0.5 for 1")]
    NO_NUMBERS = ["0.5", None, ["a"], [[1.0]], np.ones((2, 2)), {"f": 1.0}]
    REFUSED += [({"f1": value}, "'f1'") for value in NO_NUMBERS]

    @each("result, shown", REFUSED, ids=lambda value: str(value)[:30])
    def test_anything_but_a_dict_of_numbers_by_name_is_refused_and_shown(self, result, shown):
        with pytest.raises(TypeError, match="(?s)must return a dict of metric names.*" + shown):
            evaluate(small_model(FIRST), (X, Y), lambda p, l: result, batch_size=8)

    def test_values_become_plain_numbers_and_those_of_one_axis_a_number_for_each_entry(self):
        values = dict(a=np.float32(0.5), b=np.array(3), c=tf.constant(0.25), d=np.bool_(True))
        values |= dict(e=math.inf, f=[7, 1], g=tf.constant(0.5, "bfloat16"), h=np.array([math.nan]))
        evaluate(small_model(FIRST), (X, Y), lambda p, l: values, logs := {}, batch_size=8)
        numbers = dict(a=0.5, b=3, c=0.25, d=True, e=math.inf, f_0=7, f_1=1, g=0.5, h_0=math.nan)
        assert repr(logs) == repr(numbers)  # since nan is not equal to itself

class TestLogs:
    def test_later_callbacks_see_the_metrics_in_place_of_keras_own(self, keras, tmp_path, capsys):
        falling, log = iter([0.9, 0.8, 0.7, 0.6]), tmp_path / "log.csv"
        ious = {"per_category_iou": np.array([0.25, 1.0]), "accuracy": 2.0}
        callbacks = [
            KerasMetricCallback(lambda p, l: {"f1": next(falling), **ious}, (X, Y), batch_size=8),
            KerasMetricCallback(lambda p, l: {"n": len(p)}, X[:5], batch_size=8),
            keras.callbacks.EarlyStopping("f1", mode="max", patience=2),
            keras.callbacks.CSVLogger(str(log)), pushing(tmp_path),
        ]
        fit = fit_in_order(small_model(keras), epochs=9, verbose=2, callbacks=callbacks)
        seen = {"f1": [0.9, 0.8, 0.7], "n": [5, 5, 5], "accuracy": [2.0, 2.0, 2.0]}
        seen |= {"per_category_iou_0": [0.25] * 3, "per_category_iou_1": [1.0] * 3}
        assert {name: fit.history[name] for name in seen} == seen
        rows = csv.DictReader(log.read_text().splitlines())
        assert [row["f1"] for row in rows] == ["0.9", "0.8", "0.7"]
        assert [row["f1"] for row in callbacks[-1].training_history] == seen["f1"]
        assert capsys.readouterr().out.count("accuracy: 2.0000") == 3

    @each("verbose, tty, drawn", [(1, 1, 1), ("auto", 1, 1), (0, 1, 0), (2, 1, 0), (1, 0, 0)])
    def test_a_bar_is_drawn_on_a_terminal_and_wiped(self, monkeypatch, verbose, tty, drawn):
        delays, terminal, tqdm = [], io.StringIO(), kc.tqdm
        terminal.isatty = lambda: bool(tty)
        hurry = lambda *of, delay, **rest: delays.append(delay) or tqdm(*of, mininterval=0, **rest)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(kc, "tqdm", hurry)
        fit_in_order(small_model(FIRST), verbose=verbose, callbacks=[measuring([], batch_size=1)])
        _, bar, rest = terminal.getvalue().rpartition("Evaluating")
        assert (bool(bar), bool(re.search("\r *\r", rest)), delays) == (drawn, drawn, [2])

class TestEvalDataset:
    ROWS = tf.data.Dataset.from_tensor_slices((X, Y))
    SPECS = tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int64)
    SMALL = Y, Y.astype("uint8")  # the last part of which has no room for -100

    @each("data, expected", [
        ((X, Y), Y), ((X, Y, np.ones(22)), Y), ((tf.constant(X), tf.constant(Y)), Y),
        (X, None), (tf.constant(X), None), ((X,), None), ((X, None), None),
        (in_batches(X, tf.sparse.eye(22)), np.eye(22)), (in_batches(X, (Y, None)), (Y, None)),
        (in_batches(X, EvalPair(Y, SMALL)), EvalPair(Y, SMALL)),
    ], ids="pair weights tensors array tensor x (x,None) sparse (y,None) nested".split())
    def test_data_are_batched_and_give_labels_in_their_nesting_or_none(self, keras, data, expected):
        received = evaluate(model := small_model(keras), data, batch_size=5)
        assert_same(received, EvalPair(by_numpy(model), expected))

    @each("generates", [False, True], ids=["predict", "generate"])
    def test_it_is_read_once_an_epoch_in_any_order_without_empty_batches(self, keras, generates):
        def shuffled():
            passes.append(RNG.permutation(22))
            yield from ((X[rows], rows) for rows in np.split(passes[-1], [0, 9, 9, 22]))
        passes, data = [], tf.data.Dataset.from_generator(shuffled, output_signature=self.SPECS)
        callback = measuring(received := [], data, predict_with_generate=generates)
        twice = lambda self, inputs: inputs * (2 if inputs.shape[0] != 0 else 1 // 0)
        model = own_model(keras, call=twice, generate=twice)
        model.fit(X, X, verbose=0, epochs=2, callbacks=[callback])
        begin(callback, model)  # and no epoch follows
        model.fit(X, X, verbose=0, callbacks=[callback])
        assert_equal([pair.labels for pair in received], [*passes[:2], passes[3]])
        assert_equal([pair.predictions for pair in received], [X[rows] * 2 for _, rows in received])

    def test_one_that_can_be_read_only_once_serves_one_epoch_and_is_named_in_the_next(self, keras):
        received, batches = [], iter([(X[:8], Y[:8]), (X[8:], Y[8:])])
        data = tf.data.Dataset.from_generator(lambda: batches, output_signature=self.SPECS)
        with pytest.raises(ValueError, match=r"(?s)none.*only once.*from_generator"):
            fit_in_order(small_model(keras), epochs=3, callbacks=[measuring(received, data)])
        assert_equal([pair.labels for pair in received], [Y])

    def test_a_cache_in_a_file_serves_validation_data_as_well(self, keras, tmp_path):
        data, received = in_batches(X, Y).cache(str(tmp_path / "cache")), []
        options = dict(epochs=2, validation_data=data, callbacks=[measuring(received, data)])
        fit_in_order(small_model(keras), **options)  # one that is left open would lock the file
        assert_equal([pair.labels for pair in received], [Y, Y])

    ENDS = {"start_positions": X + 1, "end_positions": X + 2}
    COLUMNS = {"ids": X, **ENDS, "labels": X + 3}
    AB = X, {"a": Y, "b": Y + 1}

    @each("data, wanted, expected", [
        (COLUMNS, None, X + 3), ({"ids": X, **ENDS}, None, ENDS), ((COLUMNS, Y), None, Y),
        (COLUMNS, "end_positions", X + 2), ((COLUMNS, {"ids": Y, "n": X}), "ids", Y),
        ((X, {"a": Y}), None, Y), (AB, ["b", "a"], {"b": Y + 1, "a": Y}), (COLUMNS, [], None),
        ((COLUMNS, Y), [], None), ((COLUMNS,), None, None), ((COLUMNS, None, X), None, None),
        (({"a": None, "b": X}, Y), [], None),
    ], ids="labels positions tuple one of-labels single two no no-of-pair (x,) x,None gap".split())
    def test_labels_are_found_and_stay_inputs(self, keras, caplog, data, wanted, expected):
        total = lambda inputs: sum(x for x in tf.nest.flatten(inputs) if x is not None)
        model = own_model(keras, call=lambda self, inputs: total(inputs))
        predictions, labels = evaluate(model, data, batch_size=8, label_cols=wanted)
        inputs = data[0] if isinstance(data, tuple) else data
        np.testing.assert_allclose(predictions, total(inputs), rtol=1e-6)
        assert_equal([labels], [expected])
        assert not isinstance(expected, dict) or list(labels) == list(expected)
        is_guess = isinstance(data, dict) and wanted is None
        assert [level for level, _ in logged(caplog)] == ["WARNING"] * is_guess

    @each("data, names, labels", [
        ({"labels": X, "query": X * 3}, ["query", "labels"], X),  # an input called so
        (({"a": X, "x": X * 3, "y": X}, {"x": X + 1}), ["x", "y"], X + 1),  # labels called so
        ({"x": X, "labels": -X}, ["x"], -X),
    ], ids=["input named labels", "labels named as an input", "sequential"])
    @pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match:UserWarning")
    def test_a_model_with_named_inputs_gets_just_these_columns(self, keras, data, names, labels):
        inputs = {name: keras.layers.Input((4,), name=name) for name in names}
        if len(names) > 1:
            model = keras.Model(inputs, keras.layers.Subtract()([inputs[name] for name in names]))
        else:
            model = keras.Sequential([*inputs.values(), keras.layers.Rescaling(2.0)])
        assert_close(evaluate(model, data, batch_size=8), EvalPair(X * 2, labels))

    NO_FUNCTIONS = None, {"f1": 1}, lambda: {}, lambda a, b, c: {}, lambda *, predictions: {}
    REFUSED = [  # data, options, error, words
        (X, {"batch_size": 0}, ValueError, "batch_size must be .* received batch_size=0"),
        (ROWS.batch(8).repeat(), {}, ValueError, "must be finite"),
        (ROWS.map(lambda x, y: {"x": x, "labels": y}), {}, ValueError, "must be batched"),
        ((X[:0], Y[:0]), {}, ValueError, "is empty"), ((X, Y[:3]), {}, ValueError, "22 and 3"),
        ((X, Y, Y, Y), {}, ValueError, "have 4 parts"), ([X, Y], {}, TypeError, "received list"),
        ({"x": X, "y": Y}, {}, ValueError, r"set label_cols .* \['x', 'y'\], or label_cols=\[\]"),
        ({"x": X, "y": Y}, {"label_cols": ["b"]}, ValueError, r"has \['x', 'y'\], .* \['b'\]"),
        ((X, Y), {"label_cols": ["labels"]}, ValueError, "no named columns"),
        *((X, {"metric_fn": f}, TypeError, "metric_fn must .* but received") for f in NO_FUNCTIONS),
    ]

    @each("data, options, error, words", REFUSED, ids=lambda value: str(value)[:30])
    def test_what_cannot_be_used_is_refused_at_construction(self, data, options, error, words):
        options = {"metric_fn": lambda p, l: {}, "batch_size": 8, **options}
        with pytest.raises(error, match=words):
            KerasMetricCallback(eval_dataset=data, **options)

class TestRehearsal:  # one batch before the first epoch finds what cannot work and changes nothing
    AB, ADD_ONE = {"a": X, "b": X}, lambda self, x: x + 1
    UNKNOWN = tf.data.Dataset.from_generator(lambda: zip(X, Y), ("float32", "int64"))
    NONE = in_batches(X, Y).filter(lambda x, y: False)
    OBJECTS = lambda self, x: [dataclasses.make_dataclass("Found", ["box"])(row) for row in x]
    NAMES = r"output_cols must name outputs of Own, .*\['sum'\], but received \['b'\]"
    REFUSED = {  # data, methods of the model (None: its inputs are a, b, its output sum), words
        "missing column": ({"a": X}, None, ["predict", "Own", "'a'", "'b'", "Error|Warning"]),
        "another name": (AB, None, [NAMES]),
        "another shape": (X[:, :3], {}, ["predict", "Own", r", 3\)", "Error"]),
        "unbatched": (UNKNOWN, {}, ["must be batched"]), "not one batch": (NONE, {}, ["gave none"]),
        "no verbose": (X, {"predict": ADD_ONE}, ["predict", "Own", "TypeError", "verbose"]),
        "no generate": (X, {"generate": None}, ["Own", "generate"]),
        "a tuple": (((X, X), Y), {"generate": ADD_ONE}, ["generate", "Own", r", 4\)", "Error"]),
        "objects": (X, {"generate": OBJECTS}, ["TypeError", "Found"]),
    }

    @each("data, methods, words", REFUSED.values(), ids=REFUSED)
    def test_what_cannot_work_is_refused_before_the_first_epoch(self, keras, data, methods, words):
        own, asks = methods or {}, {"predict_with_generate": "generate" in (methods or {})}
        model = own_model(keras, **{name: method for name, method in own.items() if method})
        if methods is None:
            asks = {"label_cols": [], "output_cols": "b" if "b" in data else None, "train": self.AB}
            inputs = {name: keras.layers.Input((4,), name=name) for name in "ab"}
            model = own_model(keras, inputs, {"sum": keras.layers.Add()([*inputs.values()])})
        assert_refused(model, data, *words, **asks)

    @each("is_built, always_drops", [(True, True), (False, True), (False, False)])
    def test_training_gives_the_same_bits_as_without_it(self, keras, is_built, always_drops):
        def train(*callbacks):
            keras.utils.set_random_seed(7)
            of, drop = keras.layers, keras.layers.Dropout(0.5)
            if always_drops:  # in predictions too
                drop.call = lambda x, training=None: type(drop).call(drop, x, training=True)
            build = lambda self, shape: self.inner.build((shape[0], 1, shape[1]))
            own = {"call": lambda self, x: self.inner(x[:, None]), "build": build, "layers": 2}
            block = type("Block", (of.Layer,), own)()  # such an attribute may be anything
            block.inner = of.LSTM(8, stateful=is_built)
            layers = [block, of.BatchNormalization(), drop, of.Dense(3, "softmax")]
            model = keras.Sequential([of.Input(batch_shape=(2, 4))] * is_built + layers)
            model.compile("adam", LOSS)
            fit = fit_in_order(model, epochs=2, batch_size=2, callbacks=callbacks)
            return [fit.history["loss"], *model.get_weights()]
        assert_equal(train(measuring([], batch_size=2)), train())

class TestPredictions:  # outputs equal those of Keras' own predict, or NumPy written out
    NESTED, ABC = {"a": 2.0, "b": (3.0, 4.0)}, {"a": 2.0, "b": 3.0, "c": 4.0}
    OUTPUTS = [  # of the model, asked for, received; a number is that many times X
        ([2.0, 3.0], None, [2.0, 3.0]), ((2.0, 3.0), None, (2.0, 3.0)), (NESTED, None, NESTED),
        ({**ABC, "loss": 5.0}, None, ABC), ({**ABC, "loss": 5.0}, "b", 3.0),
        ({**ABC, "loss": 5.0}, ["loss", "c"], {"loss": 5.0, "c": 4.0}), ({"loss": 5.0}, None, 5.0),
    ]

    @each("outputs, wanted, kept", OUTPUTS)
    def test_outputs_keep_their_nesting_or_are_chosen_by_name(self, keras, outputs, wanted, kept):
        inputs = keras.layers.Input((4,)), keras.layers.Input((4,))
        scaled = lambda scale: keras.layers.Rescaling(scale)(keras.layers.Subtract()([*inputs]))
        model = keras.Model(inputs, tf.nest.map_structure(scaled, outputs))
        received = evaluate(model, ((X * 2, X), Y), batch_size=8, output_cols=wanted).predictions
        assert_same(received, tf.nest.map_structure(lambda scale: X * scale, kept))
        assert not isinstance(kept, dict) or list(received) == list(kept)

    @each("options", [{"run_eagerly": True}, {"jit_compile": True}, {"policy": "mixed_bfloat16"}])
    def test_they_are_float32_however_the_model_is_compiled(self, keras, options):
        model = small_model(keras, "sgd", **options)
        expected = model.predict(X, batch_size=8, verbose=0).astype("float32")
        received = evaluate(model, (X, Y), batch_size=8).predictions
        np.testing.assert_allclose(received, expected, rtol=1e-5)
        assert received.dtype == np.float32

    def test_outside_fit_they_are_fresh_arrays_of_the_model_and_the_weights_of_now(self, keras):
        received, model, other = [], small_model(keras), small_model(keras)
        callback = measuring(received, batch_size=32)  # one batch, which need not be joined
        other.set_weights([w + 1 for w in other.get_weights()])
        for of_now in (model, model, other):
            callback.set_model(of_now)
            callback.on_epoch_end(0, {})
            assert_close(received[-1], EvalPair(by_numpy(of_now), Y))
            received[-1].predictions[:] = received[-1].labels[:] = -100
            of_now.set_weights([w * 2 for w in of_now.get_weights()])

    def test_a_deep_copy_works_like_the_original(self, keras, tmp_path):
        both = copy.deepcopy([measuring([]), pushing(tmp_path)])
        assert fit_in_order(small_model(keras), callbacks=both).history["n"] == [1]
        assert_pushed(both[1], keras=keras)

    @pytest.mark.skipif(BACKEND != "tensorflow" or os.name != "posix", reason="asks getrusage")
    def test_memory_holds_the_predictions_and_one_batch(self):
        code = """
import resource, numpy as np, test_keras_callbacks as tests
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
layers, x = tests.FIRST.layers, np.ones((2**15, 1), "float32")
data = tests.in_batches(x, x, size=64)
model = tests.FIRST.Sequential([layers.Input((1,)), layers.Dense(4096)])
tests.evaluate(model, data.take(2))
before, size = peak(), tests.evaluate(model, data).predictions.nbytes  # 512 MiB
assert peak() - before < 1.2 * size, (peak() - before) / size
"""
        children((code, {}))

class TestJoining:  # batches become one array, against NumPy written out
    ROWS = [  # dtype, labels of the examples, the same padded, their dtype
        ("float32", [[1], [3]], [[1], [3]], "float32"), ("uint8", [[1], [3]], [[1], [3]], "uint8"),
        (tf.bfloat16.as_numpy_dtype, [[1], [2, 3]], [[1, -100], [2, 3]], "float32"),
        ("int32", [[[1, 2]], [[4], [5]]], [[[1, 2], [-100] * 2], [[4, -100], [5, -100]]], "int32"),
        ("uint8", [[255, 2], [3]], [[255, 2], [3, -100]], "int16"),
        ("uint64", [[1], [3], [2**63, 4]], [[1, -100], [3, -100], [2**63, 4]], object),
        ("bool", [[True, False], [True], []], [[1, 0], [1, -100], [-100, -100]], "int8"),
        (object, [["\u00e9".encode(), b"b"], [b"\xff"]], [["\u00e9", "b"], [b"\xff", ""]], object),
    ]

    @each("are_ragged", [False, True], ids=["batches", "ragged"])
    @each("dtype, rows, expected, widened", ROWS)
    def test_labels_are_padded_on_every_axis(self, are_ragged, dtype, rows, expected, widened):
        data = as_pipeline([(X[:1], np.array([row], dtype)) for row in rows])
        if are_ragged:
            data = in_batches(X[: len(rows)], tf.ragged.constant(rows, dtype), size=2)
        labels = evaluate(small_model(FIRST), data).labels
        assert (labels.tolist(), labels.dtype) == (expected, widened)

    @staticmethod
    def joined_generations(*batches):
        replies = iter([batches[0], *batches])  # the first one twice, for the rehearsal
        model = own_model(FIRST, generate=lambda self, inputs, **options: next(replies))
        options = {"predict_with_generate": True, "generate_kwargs": {"pad_token_id": 9}}
        return evaluate(model, in_batches(X[:4], size=2), **options).predictions

    def test_nesting_is_kept_missing_steps_and_tokens_are_padding_and_masks_0(self):
        def batch(width, *steps):
            ones = np.ones((2, width))
            columns = {"token_ids": 5 * ones.astype(int), "a_mask": ones > 0, "scores": steps}
            return {"pair": EvalPair(ones, {"a": (one, None)}), **columns}
        one, two = np.ones((2, 1)), np.ones((2, 2))
        joined = self.joined_generations(batch(2, one), batch(1, two, one))
        short, long, nested = [[1, -100]] * 2, [[1, 1]] * 2, {"a": (np.ones((4, 1)), None)}
        assert_same(joined["pair"], EvalPair(np.array(long + short), nested))
        steps = np.array(short + long), np.array([[-100]] * 2 + [[1]] * 2)
        assert_equal(joined["scores"], steps)
        assert joined["token_ids"].tolist() == [[5, 5]] * 2 + [[5, 9]] * 2
        assert joined["a_mask"].tolist() == [[True, True]] * 2 + [[True, False]] * 2
        masks = [{"a_mask": np.ones((2, width), int)} for width in (2, 1)]
        assert self.joined_generations(*masks).tolist() == [[1, 1]] * 2 + [[1, 0]] * 2  # alone

    AB, ONE, PAIR = {"a": np.ones(2), "b": np.ones(2)}, (X[:2],), (X[:2], X[:2])

    @each("first, second, shown", [
        (AB, {"a": np.ones(2), "c": np.ones(2)}, "b.*c"), ({"a": np.ones(2)}, AB, "'a'.*'b'"),
        (PAIR, ONE, "1.*2"), (ONE, PAIR, "1.*2"), (np.ones(2), np.ones((2, 2)), "1.*2"),
    ], ids=["names", "more columns", "shorter tuple", "longer tuple", "axes"])
    def test_batches_that_differ_in_structure_are_refused(self, first, second, shown):
        with pytest.raises(ValueError, match="All batches must have .*" + shown):
            self.joined_generations(first, second)

@ON_TF
class TestAsPredict:  # users' code gets and gives what it does in Keras' own predict
    @each("method", ["predict_step", "predict", "make_predict_function"])
    @each("options", [{}, {"run_eagerly": True}, {"steps_per_execution": 3}])
    def test_each_point_of_override_counts_as_in_predict(self, keras, method, options):
        def make_predict_function(self, force=False):
            if self.predict_function is None or force:
                step = keras.Model.make_predict_function(self, force) or self.predict_function
                self.predict_function = lambda iterator: 2 * step(iterator)
            return self.predict_function
        predict = lambda self, data, **more: 3 * keras.Model.predict(self, data, **more)
        predict_step = lambda self, data: self(data[0]) + data[1] * 2 * data[2][:, None]
        model, own = own_model(keras), {"predict": predict, "predict_step": predict_step}
        setattr(model, method, types.MethodType(own.get(method, make_predict_function), model))
        model.compile("sgd", "mse", **options)
        received = assert_as_predict(model, in_batches(X, TARGETS, np.ones(22, "float32")))
        assert_equal(received.labels, TARGETS)

    @each("method, functional", [("call", True), ("call", False), ("predict_step", True)])
    def test_own_methods_get_all_columns_and_name_the_outputs(self, keras, method, functional):
        def call(self, x, training=None, mask=None):
            return {"hidden": x["a"], "logits": x["a"] + x.get("b", 0)}
        a = keras.layers.Input((4,), name="a")
        own = {method: call if method == "call" else lambda self, data: call(self, data[0])}
        model = own_model(keras, *([{"a": a}, {"hidden": a}] if functional else []), **own)
        model({"a": a})  # as for summary
        received = after_fit(model, in_batches({"a": X, "b": X}, TARGETS), output_cols=["logits"])
        np.testing.assert_array_equal(received.predictions, X * 2)

    ROWS, PARTS = [np.arange(length) for length in (3, 1, 2, 4, 1)], (X[:8], X[8:16], X[16:])
    RAGGED = in_batches(tf.ragged.constant(list(map(list, ROWS))), size=2)
    ranks = lambda self, data, verbose: np.concatenate([*data])[:, 0].argsort().tolist()
    pairs = lambda self, data: EvalPair(data.predictions * 2, (data.labels, [None, data[0]]))
    NAMED, MEANS = in_batches(X, TARGETS).map(EvalPair), np.array([x.mean() for x in PARTS])
    OWN = {  # a method, data, expected predictions
        "a list": ("predict", ranks, in_batches(X), np.hstack([x[:, 0].argsort() for x in PARTS])),
        "named tuples and None, which keeps its place": (
            "predict_step", pairs, NAMED, EvalPair(X * 2, (TARGETS, [None, X]))
        ),
        "a scalar for each batch": (
            "predict_step", lambda self, x: tf.reduce_mean(x), in_batches(X), MEANS
        ),
        "ragged": ("predict_step", lambda self, x: x, RAGGED, padded(ROWS)),
    }

    @each("method, function, data, expected", OWN.values(), ids=OWN)
    def test_own_methods_are_asked_by_the_batch(self, keras, method, function, data, expected):
        model = own_model(keras, **{method: function})
        assert_same(evaluate(model, data).predictions, expected)

    def test_the_model_is_traced_in_its_first_fit_and_when_it_is_compiled_anew(self, keras):
        call = lambda self, inputs: inputs * (self.scale if tf.executing_eagerly() else -self.scale)
        model, callback = own_model(keras, call=call), measuring(received := [])
        for model.scale, options in [(2, {}), (3, None), (4, {}), (5, {"run_eagerly": True})]:
            if options is not None:
                model.compile("sgd", "mse", **options)
            model.fit(X, X, verbose=0, callbacks=[callback])
        assert_close([pair.predictions for pair in received], [X * -2, X * -2, X * -4, X * 5])

class TestQuestions:  # what a `generate` of one's own gets, and what it may return
    @each("as_given, token, config, options, padding", [
        (list, 5, {}, {}, -100), (tf.ragged.constant, 5, {"pad_token_id": 9}, {}, 9),
        (lambda rows: list(map(tf.constant, rows)), 5, {"pad_token_id": 9}, {"pad_token_id": 7}, 7),
        (list, "a", {}, {}, ""), (lambda rows: list(map("".join, rows)), "a", {}, {}, None),
    ], ids=["lists", "ragged, token of the model", "tensors, token given", "letters", "texts"])
    def test_text_gives_rows_of_tokens_or_text_and_xla_warns_that_it_has_no_effect(
            self, keras, caplog, as_given, token, config, options, padding):
        generate = lambda self, x, **more: as_given([[token] * len(text) for text in x.numpy()])
        model, texts = own_model(keras, generate=generate), ["a", "aa", "aaa", "a", "aa"]
        model.config, use_xla = types.SimpleNamespace(**config), token == 5
        generation = dict(predict_with_generate=True, generate_kwargs=options, batch_size=2)
        pair = evaluate(model, (np.array(texts),) * 2, use_xla_generation=use_xla, **generation)
        rows = [[token] * len(text) + [padding] * (3 - len(text)) for text in texts]
        assert [column.tolist() for column in pair] == [texts if padding is None else rows, texts]
        assert ("compile(jit_compile=True)" in caplog.text) is use_xla

    def test_settings_that_cannot_work_leave_nothing_behind(self, keras):
        model = own_model(keras, generate=lambda self, x, scale: x * scale)
        callback = measuring(received := [], X, predict_with_generate=True)
        for scale in (2.0, "two", 2.0):
            callback.generate_kwargs["scale"] = scale
            with pytest.raises(ValueError) if scale == "two" else contextlib.nullcontext():
                model.fit(X, LABEL, verbose=0, callbacks=[callback])
        assert_equal([pair.predictions for pair in received], [X * 2, X * 2])

    ANSWERED = {"ids": X, "b": X * 2}
    AT_FIRST = np.where(np.arange(22)[:, None] < 8, X * 2, X)  # equals ANSWERED["b"] in one batch
    total = lambda self, x: sum(x.values())
    lists = lambda self, x: {"n": [float(n) for n in x[:, 0]], "word": ["a"] * len(x)}
    TAKEN = {  # what generate does, data, options, expected predictions
        "tuples": (lambda self, x: (x[0] * 2, x[1]), ((X, X[:, 0]), Y), {}, (X * 2, X[:, 0])),
        "a column labels": (total, {"ids": X, "labels": X * 2}, {}, X),
        "a label column": (total, ANSWERED, {"label_cols": "b"}, X),
        "labels called like an input": (total, (ANSWERED, {"b": AT_FIRST}), {}, X * 3),
        "lists for each column": (lists, X, {"output_cols": ["n"]}, X[:, 0]),
    }

    @each("generate, data, options, expected", TAKEN.values(), ids=TAKEN)
    def test_the_answer_is_no_question(self, keras, generate, data, options, expected):
        model = own_model(keras, generate=generate)
        received = evaluate(model, data, batch_size=8, predict_with_generate=True, **options)
        assert_same(received.predictions, expected)

# PushToHubCallback ---------------------------------------------------------------------------
def write_files(folder, *names, text="the user's"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

class TestPushArguments:
    @each("arguments, error, match", [
        ({"save_strategy": "batch"}, ValueError, r"\['no', 'steps', 'epoch'\], .* 'batch'"),
        ({"save_strategy": "steps", "save_steps": 2.0}, ValueError, "positive .* save_steps=2.0"),
        ({"save_strategy": "no", "checkpoint": True}, ValueError, 'needs save_strategy="epoch"'),
        ({"tokenizer": "bert"}, TypeError, "save_pretrained.*save_to_preset.* a str"),
        ({"licence": "mit"}, TypeError, r"'finetuned_from'.*but received \['licence'\]"),
        ({"hub_model_id": "a--b"}, ValueError, "a--b"),
    ])
    def test_what_does_not_fit_is_refused_at_once(self, tmp_path, arguments, error, match):
        with pytest.raises(error, match=match):
            pushing(tmp_path, **arguments)
        assert not hub.repos and not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_written_is_refused_at_construction(self, tmp_path):
        (tmp_path / "model").symlink_to("/proc/self/fdinfo")  # where even root makes no file
        with pytest.raises(OSError):
            pushing(tmp_path, hub_model_id="model")

    def test_the_repository_is_named_after_the_folder_or_as_asked(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", WRITE)  # the cached token will do
        for asked_for in (None, "a", "user/b", "a"):  # which exists by then
            PushToHubCallback(tmp_path / "model", hub_model_id=asked_for)
        assert list(hub.repos) == ["user/model", "user/a", "user/b"]

    @each("exists", [True, False])
    @each("token, owner", [("hf_read", "user"), (WRITE, "other"), ("hf_wrong", "user")])
    def test_a_token_that_may_not_write_is_refused(self, tmp_path, token, owner, exists):
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
        end = fit_in_order(model, epochs=3, callbacks=[change, push, awaiting(push, keras)])
        progress = map("Training in progress, epoch {}".format, range(3))
        assert commits(push) == [*progress, "End of training"]
        assert_pushed(push, keras, x=X)
        assert contents(push.output_dir) == {n: c for n, c in pushed(push).items() if n[0] != "."}
        assert not leftovers(push.output_dir)
        assert [row["loss"] for row in push.training_history] == end.history["loss"]
        assert push.last_job.result().oid == hub.repos[push.hub_model_id][-1]["oid"]

    # Four at once end after batch 4, 8, 10, nine after 9, 10; with endless data Keras 3 trains 12.
    @pytest.mark.filterwarnings("ignore:Your input ran out of data")
    @each("size", ["known", "unknown", "endless"])
    @each("options, at_once", [({}, 1), ({}, 4), ({}, 9), ({"gradient_accumulation_steps": 2}, 4)],
          ids=["one by one", "in fours", "in nines", "gradients gathered"])
    def test_steps_are_counted_as_they_are_trained(self, keras, tmp_path, options, at_once, size):
        refused = (options or (at_once, size) == (4, "unknown")) and keras not in KERAS3
        if refused or (at_once > 1 and BACKEND == "torch") or (at_once == 9 and size != "known"):
            pytest.skip("not in this Keras")
        model, data = small_model(keras), in_batches(X[:20], Y[:20], size=2)
        optimizer = keras.optimizers.Adam(**options)  # with a loss scale around it, in one case
        around = keras.optimizers.LossScaleOptimizer if options else lambda optimizer: optimizer
        model.compile(around(optimizer), LOSS, steps_per_execution=at_once)
        endless = {"steps_per_epoch": 10} if size == "endless" else {}
        data = {"known": data, "unknown": data.filter(lambda *of: True), "endless": data.repeat()}
        push = pushing(tmp_path, save_strategy="steps", save_steps=20)
        # Of unknown size Keras 3 counts one update more in each epoch.
        count = lambda: len(hooks) if at_once == 1 else int(optimizer.iterations)

        def wait(batch, logs):
            hooks.append(batch)
            if push.last_job and push.last_job not in trained:
                trained[push.last_job] = count()
                push.last_job.result(timeout=60)
                assert len(rows_of(pushed(push)["README.md"].decode())) < 5  # of this `fit` alone
        callbacks, hooks = [push, keras.callbacks.LambdaCallback(on_train_batch_end=wait)], []
        for _ in range(2):  # in each `fit` anew
            before, trained = count(), {push.last_job: 0}
            model.fit(data[size], epochs=5, verbose=0, callbacks=callbacks, **endless)
            counts = [(n - before) * (2 if options else 1) for n in [*trained.values()][1:]]
            assert counts[:2] == [20, 40] and not any(count % 20 for count in counts)
            progress = [f"Training in progress, step {count}" for count in counts]
            assert commits(push)[-1 - len(counts) : -1] == progress

    @each("strategy, verbose", [("No", 2), (kc.IntervalStrategy.EPOCH, 0)])
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

class TestPushedFiles:  # of output_dir and of the repository, to which others write too
    SECRETS = """
        .env .netrc .git/config my.pem my.key prod.env kaggle.json credentials.json
        credentials.d/a.txt token token.txt stored_tokens _netrc client_secret_1.json id_rsa
        id_rsa.pub id_ed25519 my.p12 my.pfx .keras_callbacks-1/x rescued.weights.h5 secrets.toml
        service_account.json passwords.txt hf_token.txt API_key.txt
    """.split()

    def test_no_credentials_nor_caches_are_pushed_by_us_or_by_hand(self, push, caplog):
        for folder in ("", "logs", "logs/deeper"):
            write_files(push.output_dir / folder, *self.SECRETS, "plain.txt")
        write = lambda folder: write_files(pathlib.Path(folder), "bpe.key", text="a b")
        push.tokenizer = types.SimpleNamespace(save_pretrained=write)
        hub.add_fault("commit", 403)
        push.on_train_end()
        ((level, message),) = logged(caplog)
        assert level == "ERROR" and re.search("final state could not be pushed to .*403", message)
        code = "import huggingface_hub, keras_callbacks\n" + message.splitlines()[-1]
        children((code, {"HF_TOKEN": WRITE}))
        by_hand = pushed(push)
        write_files(push.output_dir, "Credentials")  # that command looks at the case
        saved(push)
        assert pushed(push).keys() - by_hand.keys() == {"bpe.key", kc.CHECKPOINT}
        names = {name for name, content in pushed(push).items() if content == b"the user's"}
        assert names == {"plain.txt", "logs/plain.txt", "logs/deeper/plain.txt"}
        assert (push.output_dir / "bpe.key").read_bytes() == pushed(push)["bpe.key"] == b"a b"

    def test_many_files_are_told_once_and_cost_a_handful_of_requests(self, model, tmp_path, caplog):
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

    @each("kind", ["unreadable", "special", "gone", "a folder by now", "no text as its name"])
    @BOTH
    def test_a_users_file_that_cannot_be_copied_is_left_out(self, push, caplog, strategy, kind):
        odd, changes = push.output_dir / "odd.bin", []
        name = {"no text as its name": os.fsdecode(b"odd.bin\xe9")}.get(kind, "odd.bin")
        make = {"special": os.mkfifo, "unreadable": lambda odd: odd.symlink_to("/proc/self/mem")}
        make.get(kind, lambda odd: write_files(push.output_dir, name))(odd)
        write_files(push.output_dir, "mine.txt")
        if kind in ("gone", "a folder by now"):  # once somebody is about to open it
            changes += [lambda: odd.unlink() or kind == "gone" or odd.mkdir()]
        opens = lambda event, of: changes and event == "open" and "odd.bin" in str(of[0])
        sys.addaudithook(lambda *happening: opens(*happening) and changes.pop()())
        assert end(push, strategy) is None
        ((level, message),) = logged(caplog)
        assert level == "WARNING" and "odd.bin" in message
        assert "mine.txt" in pushed(push) and "odd.bin" not in pushed(push)
        assert_pushed(push)

    @each("early", [True, False], ids=["at construction", "later"])
    @each("name", [WEIGHTS, "a_vocab.txt", kc.CHECKPOINT, "README.md"])
    def test_a_users_file_that_is_replaced_is_told_once(self, model, tmp_path, caplog, name, early):
        folder, told = tmp_path / "model", lambda: sum(name in text for _, text in logged(caplog))
        write_files(folder, *[name] * early)
        push = pushing(tmp_path, checkpoint=True, tokenizer=Tokenizer())
        assert told() == early
        begin(push, model)
        write_files(folder, *[name] * (not early))
        for epoch in range(2):
            saved(push, epoch)
            assert told() == (early or name != "README.md")  # a human's card is left whole
            assert ((folder / name).read_bytes() == b"the user's") is (name == "README.md")

    def test_hidden_folders_of_killed_runs_go_after_a_day(self, tmp_path):
        hours = {".keras_callbacks-old": 25, ".keras_callbacks-new": 23, ".mine": 25}
        for folder, age in zip([tmp_path / "model" / name for name in hours], hours.values()):
            write_files(folder, "x")
            os.utime(folder, (time.time() - age * 3600,) * 2)
        pushing(tmp_path)
        assert {path.name for path in leftovers(tmp_path / "model")} == {*list(hours)[1:]}

    def test_a_checkpoint_stays_beside_the_saves_of_another_callback(self, model, tmp_path):
        steps = pushing(tmp_path, save_strategy="steps", save_steps=2)
        epochs, other = pushing(tmp_path, checkpoint=True), small_model(FIRST)
        for callbacks in ([epochs, steps], [steps, epochs]):
            fit_in_order(model, epochs=2, callbacks=callbacks)
            for source in ("user/model", tmp_path / "model"):
                assert load_repo_checkpoint(other, source, token=WRITE) == {"epoch": 1}
                assert_equal(state_of(other), state_of(model))

# Checkpoint ----------------------------------------------------------------------------------
def assert_no_load(model, source, match, error=ValueError):
    """Asserts that a checkpoint is refused before a variable changes, with words that help."""
    before = [np.copy(value) for value in state_of(model)]
    with pytest.raises(error, match=match):
        load_repo_checkpoint(model, source, token=WRITE)
    assert_equal(state_of(model)[: len(before)], before)  # an optimizer may have been built
def of_two_parts(keras, place):
    """A model without a call, or around one part, that trains each part with its own optimizer."""
    class Adversaries(keras.Model):
        def train_step(self, data):
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean(tf.square(self.run(data[0]) - 1.0))
            for optimizer, part in self.training():
                gradients = tape.gradient(loss, part.trainable_variables)
                optimizer.apply_gradients(zip(gradients, part.trainable_variables))
            return {"loss": loss}
    keras.utils.set_random_seed(7)
    g, d, of = keras.optimizers.Adam(0.1), keras.optimizers.RMSprop(0.01), keras.layers
    left, right = (keras.Sequential([of.Input((4,)), of.Dense(4)]) for _ in range(2))
    if place == "of a part in the middle":
        inputs = of.Input((4,))
        right = model = Adversaries(inputs, of.Dense(3)(left(of.Dense(4)(inputs))))
        left.compile(g)
        model.compile(d)
        model.run = lambda x: model(x)
    else:
        model = Adversaries()
        model.left, model.right, model.run = left, right, lambda x: right(left(x))
        holder = left if place == "in a part" else model
        holder.g, holder._d = ({"g": g}, {"d": [d]}) if place == "in a dict" else (g, d)
        model.compile()
    model.training = lambda: [(g, left), (d, right)]
    return model
OPTIMIZERS = {
    "momentum": lambda of: of.SGD(0.1, momentum=0.9),
    "average": lambda of: of.Adam(0.1, use_ema=True, ema_momentum=0.5),
    "legacy": lambda of: of.legacy.Adam(0.1),
    "accumulation": lambda of: of.Adam(0.1, gradient_accumulation_steps=2),
    "loss scale": lambda of: of.LossScaleOptimizer(of.Adam(0.1), 4.0, 2),  # grows each second step
}
KINDS, NEW = ["Adam", "momentum", "average"], ["accumulation", "loss scale", "LoRA"]
CASES = [(k, kind) for k in lineages() for kind in KINDS + (NEW if k in KERAS3 else ["legacy"])]

class TestResuming:
    @each("keras, kind", CASES, ids=[f"{'keras3' * (k in KERAS3)} {kind}" for k, kind in CASES])
    def test_resuming_from_the_hub_ends_in_the_same_bits(self, keras, tmp_path, kind):
        def make():
            keras.utils.set_random_seed(7)
            of, dtype = keras.layers, "mixed_float16" if kind == "loss scale" else None
            layers = [of.Input((4,)), of.Dense(4, dtype=dtype), of.BatchNormalization()]
            layers += [of.Dropout(0.5)] * (keras in KERAS3) + [of.Dense(3, "softmax")]
            model = keras.Sequential(layers)
            for layer in (model.layers[0], model.layers[-1]) * (kind == "LoRA"):
                layer.enable_lora(2)
            model.compile(OPTIMIZERS.get(kind, lambda of: of.Adam(0.1))(keras.optimizers), LOSS)
            return model
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        fit = lambda m, callbacks=(), **o: fit_in_order(m, callbacks=[halve, *callbacks], **o)
        step = lambda m: assert_no_load(m, "user/half", "one training step") or fit(m)
        zero = lambda logs: end.model.set_weights([0 * w for w in end.model.get_weights()])
        end = keras.callbacks.LambdaCallback(on_train_end=zero)  # the last epoch's are resumed
        assert_resumes(make, tmp_path, fit, [end], step if kind == "legacy" else None)

    @ON_TF
    @each("place", ["in attributes", "in a dict", "in a part", "of a part in the middle"])
    @pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built")
    def test_optimizers_come_back_wherever_the_model_holds_them(self, keras, tmp_path, place):
        step = lambda m: assert_no_load(m, "user/half", "one training step") or fit_in_order(m)
        assert_resumes(lambda: of_two_parts(keras, place), tmp_path, before_loading=step)

    def test_a_normalization_adapted_before_the_save_is_right_after_loading(self, keras, tmp_path):
        def make():
            last = type("My_Dense", (keras.layers.Dense,), {})(3, activation="softmax")
            model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Normalization(), last])
            model.words = keras.layers.StringLookup()
            model.words.adapt(["a"])  # in tf_keras a weight without a shape
            model.compile("adam", LOSS)
            return model
        first, second, third, push = make(), make(), make(), pushing(tmp_path, checkpoint=True)
        first.layers[0].adapt(X * 3 + 1)
        fit_in_order(first, callbacks=[push])
        second.predict(X, verbose=0)  # what this traces holds the constants before loading
        load_repo_checkpoint(second, push.output_dir)
        third.optimizer.build(third.trainable_variables)
        third.load_weights(push.output_dir / kc.CHECKPOINT)  # which needs nothing of this module
        assert "Results of epoch 0" in (push.output_dir / "README.md").read_text()
        for model in (second, third):
            assert_equal(model.predict(X, verbose=0), first.predict(X, verbose=0))

    def test_the_table_of_the_card_goes_on_where_it_stood_however_long_it_is(self, push):
        logs, resumed = {f"m{n}": n / 8 for n in range(9000)}, small_model(FIRST)  # 150 kB of JSON
        push.on_epoch_end(0, logs)
        rows = {"0": {**logs, "loss": "x\n---\n<script>", "note\n# |": 1.5}}  # by somebody else
        rewriting(history=rows)(push.output_dir / kc.CHECKPOINT)
        assert load_repo_checkpoint(resumed, push.output_dir) == {"epoch": 0}
        fit_in_order(resumed, initial_epoch=1, epochs=3, callbacks=[push])
        card = pushed(push)["README.md"].decode()
        assert rows_of(card) == [0, 1, 2] and not re.search(r"<script>|\n# \|", card)
        cells = re.search(r"^\| 0 \| (.*) \|$", card, re.MULTILINE)[1].split(" | ")
        assert cells[: len(logs)] == [f"{value:.4g}" for value in logs.values()]
def branches(keras, frozen="", order="ab", named=True, optimizer="adam", classes=3):
    """A model with two equal layers in a layer of its own, some of them not to be trained."""
    class Two(keras.layers.Layer):
        def call(self, inputs):
            return self.a(inputs) - 2 * self.b(inputs)
    keras.backend.clear_session()  # names as in a new process; else they count on
    keras.utils.set_random_seed(7)
    two, of = Two(), keras.layers
    for name in order:
        layer = of.Dense(4, name=name if named else None, trainable=name not in frozen)
        setattr(two, name, layer)
    model = keras.Sequential([of.Input((4,)), two, of.Dense(classes, "softmax")])
    model.compile(optimizer, LOSS)
    return model

class TestAnotherModel:
    @each("frozen", ["", "a", "b", "ab"])
    def test_frozen_parts_of_a_layer_resume_in_the_same_bits(self, keras, tmp_path, frozen):
        assert_resumes(lambda: branches(keras, frozen), tmp_path)

    @each("there, here, difference", [
        ({"frozen": "a"}, {}, "optimizer"), ({"frozen": "a"}, {"frozen": "b"}, "False.* True"),
        ({"frozen": "a", "optimizer": "sgd"}, {"optimizer": "sgd"}, "."),
        ({}, {"order": "ba"}, "."), ({"named": False}, {"named": False, "order": "ba"}, "Dense"),
        ({}, {"optimizer": "adamax"}, "Adam.*Adamax"), ({}, {"classes": 4}, r"\(4, 3\)"),
    ], ids=str)
    def test_another_model_or_phase_is_refused(self, keras, tmp_path, there, here, difference):
        push = pushing(tmp_path, checkpoint=True)
        fit_in_order(branches(keras, **there), callbacks=[push])
        match = f"does not fit the model.*{difference}.*freeze and compile"
        assert_no_load(branches(keras, **here), push.output_dir, match)

    def test_layers_that_change_places_are_refused_though_others_are_called_anew(
            self, keras, tmp_path):
        def make(*names):
            a, b, head = (keras.layers.Dense(3, "softmax", name=name) for name in names)
            inputs = keras.layers.Input((4,))
            model = keras.Model(inputs, head(keras.layers.Subtract()([a(inputs), b(inputs)])))
            model.compile("adam", LOSS)
            return model
        fit_in_order(make("a", "b", "head"), callbacks=[pushing(tmp_path, checkpoint=True)])
        for names in (("b", "a", "head"), ("b", "a", "new")):
            assert_no_load(make(*names), tmp_path / "model", "'a'.*'b'")

    def test_a_refused_checkpoint_does_not_build_the_optimizer_for_another_phase(
            self, keras, tmp_path):
        push, model = pushing(tmp_path, checkpoint=True), branches(keras, "a")
        fit_in_order(branches(keras), callbacks=[push])
        assert_no_load(model, push.output_dir, "does not fit")
        model.layers[0].a.trainable = True
        assert load_repo_checkpoint(model, push.output_dir) == {"epoch": 0}

    def test_layers_may_be_made_before_or_after_the_optimizer(self, keras, tmp_path):
        class Late(keras.Model):
            def build(self, shape):
                self.dense = keras.layers.Dense(3, "softmax")
                self.dense.build(shape)
            call = lambda self, inputs: self.dense(inputs)
        first, second = Late(), Late()
        for model in (first, second):
            model(X) if model is second else None
            model.compile("adam", LOSS)
        fit_in_order(first, callbacks=[pushing(tmp_path, checkpoint=True)])
        assert load_repo_checkpoint(second, tmp_path / "model") == {"epoch": 0}
        assert_equal(state_of(second), state_of(first))
def rewriting(new=None, name="keras_callbacks/state", **of_state):
    """A damage of a file: other content of a data set, none, or changes of the state in it."""
    def damage(path):
        with h5py.File(path, "r+") as file:
            old = file.pop(name)
            if new is not None or of_state:
                file[name] = json.dumps(json.loads(old[()]) | of_state) if of_state else new
    return damage

class TestUntrustedCheckpoint:
    DAMAGES = {
        "cut": lambda path: os.truncate(path, int(0.999 * path.stat().st_size)),
        "a pickle": lambda path: path.write_bytes(pickle.dumps({})),
        "an array too few": rewriting(name="layers/dense/vars/1"),
        "text for numbers": rewriting(np.full((4, 3), b"x"), "layers/dense/vars/0"),
    }
    DAMAGES |= {f"state {new}": rewriting(new) for new in (None, np.zeros(3), "{}", "{", b"\xff")}
    DAMAGES |= {f"history {h}": rewriting(history=h) for h in ({}, [1], {"-1": {}}, {"x": {}})}

    @each("damage", DAMAGES.values(), ids=DAMAGES)
    def test_a_damaged_checkpoint_is_refused_before_a_variable_changes(self, push, damage):
        saved(push)
        damage(push.output_dir / kc.CHECKPOINT)
        assert_no_load(small_model(FIRST), push.output_dir, "checkpoint", (OSError, ValueError))

    @each("path", ["here", "../no/such/one", "nosuch/", "a/b/c"])
    def test_a_checkpoint_that_is_not_there_is_missing(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        assert_no_load(small_model(FIRST), path, path.strip("./"), FileNotFoundError)

class TestNewestCheckpoint:
    def test_the_newest_revision_is_asked_for_and_no_other_is_taken(self, push, monkeypatch):
        load = lambda: load_repo_checkpoint(small_model(FIRST), push.hub_model_id, token=WRITE)
        saved(push)
        assert load() == {"epoch": 0}
        shutil.rmtree(push.output_dir)  # as somebody may in a notebook
        saved(push, 1)  # while an older one is in the cache
        fault = hub.add_fault("resolve", "wait")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            loading = pool.submit(load)
            assert fault.reached.wait(60)
            hub.commit(push.hub_model_id, "By somebody", {kc.CHECKPOINT: b"not the one"})
            fault.release.set()
            assert loading.result(timeout=60) == {"epoch": 1}
        saved(push, 2)
        hub.add_fault("resolve", 423, 1000)  # no checkpoint that is missing
        monkeypatch.setattr(kc, "CREATION_SECONDS", 0.1)
        assert_no_load(push.model, push.hub_model_id, "423", ConnectionError)
        hub.down = True  # then none comes from the cache either
        assert_no_load(push.model, push.hub_model_id, hub.url, ConnectionError)
def go_on(folder, epoch):
    """Trains two epochs more from what is on the Hub; keeps the states before and after."""
    model, push = small_model(FIRST), pushing(folder, "half", checkpoint=True)
    if epoch:
        assert load_repo_checkpoint(model, "user/half", token=WRITE) == {"epoch": epoch - 1}
    states = [state_of(model)]
    fit_in_order(model, initial_epoch=epoch, epochs=epoch + 2, callbacks=[push])
    (folder / f"{epoch}").write_bytes(pickle.dumps([*states, state_of(model)]))

class TestJaxAndTensorFlow:
    __test__ = BACKEND == "jax"

    def test_what_one_saves_the_other_resumes(self, tmp_path):
        code = "import pathlib, test_keras_callbacks as tests; tests.go_on(pathlib.Path({!r}), {})"
        for epoch, backend in ((0, "tensorflow"), (2, "jax"), (4, "tensorflow")):
            children((code.format(str(tmp_path), epoch), {"KERAS_BACKEND": backend}))
        first, second, third = (pickle.loads((tmp_path / n).read_bytes()) for n in "024")
        assert_equal([second[0], third[0]], [first[1], second[1]])

# Model card ----------------------------------------------------------------------------------
FACTS = {"tasks": "image-classification", "dataset": "digits"}  # with these there are results
HUMAN = {"README.md": b"---\nlicense: mit\n---\n# By a human\n", "notes/mine.md": b"mine"}

text_of_card = lambda push, index=-1: hub.files(push.hub_model_id, index)["README.md"].decode()
card_on_hub = lambda push, index=-1: huggingface_hub.ModelCard(text_of_card(push, index))
results_on = lambda card: {r.metric_name: r.metric_value for r in card.data.eval_results or []}

class TestCard:
    def test_the_card_has_the_facts_the_metrics_the_table_and_the_optimizer(self, keras, tmp_path):
        model = small_model(keras, keras.optimizers.Adam(beta_1=np.float32(0.875)))
        facts = dict(dataset="Digits | of\nUCI", dataset_tags="mnist", dataset_args="default")
        facts |= dict(language="en", tasks="fill-mask", tags=["a\n---\nb: <b>"])
        push = pushing(tmp_path, finetuned_from="google/base", license="mit", **facts)
        metrics = {"val_mse": 0.00012346, "f1_macro": 0.5}
        begin(push, model, epochs=2, steps=3)
        push.on_epoch_end(0, {"loss": 1.23456, "f1_macro": 1.0})
        model.set_weights([weight + 1 for weight in model.get_weights()])
        push.on_epoch_end(1, {"loss": math.nan, "val_loss": math.inf, **metrics, "a\n---\n|b": 7})
        push.on_train_end()
        card, found = card_on_hub(push), results_on(card_on_hub(push))
        assert found == metrics | {"a --- |b": 7}
        assert sorted(found) == sorted(r.metric_type for r in card.data.eval_results)
        about = dict(dataset_name="Digits | of UCI", dataset_type="mnist", dataset_config="default")
        assert vars(card.data.eval_results[0]).items() >= about.items()
        library = "keras" if keras in KERAS3 else "tf-keras"
        expected = dict(language=["en"], license="mit", datasets=["mnist"], metrics=sorted(found))
        expected |= dict(base_model="google/base", pipeline_tag="fill-mask", library_name=library)
        expected |= dict(tags=["a --- b: <b>", "generated_from_keras_callback"])
        assert card.data.to_dict().items() >= expected.items()
        config = json.loads(re.search(r"```json\n(.*?)```", card.text, re.DOTALL)[1])
        assert (config["class_name"], config["beta_1"]) == ("Adam", 0.875)  # a NumPy number
        assert re.findall(r"(?m)^\| .*", card.text) == [
            r"| Epoch | loss | f1\_macro | val\_loss | val\_mse | a --- \|b |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
            "| 0 | 1.235 | 1 |  |  |  |", "| 1 | nan | 0.5 | inf | 0.0001235 | 7 |",
        ]
        assert "\n- epochs: 2 of 3 steps\n" in card.text
        assert not re.search("(?i)distribution|strategy|replica|scratch", card.text)

    def test_a_folder_is_no_base_model_and_one_task_is_the_pipeline_tag(self, model, tmp_path):
        push = pushing(tmp_path, finetuned_from="/tmp/base", tasks=["fill-mask", "translation"])
        fit_in_order(model, callbacks=[push])
        card = card_on_hub(push)
        assert card.data.base_model is card.data.pipeline_tag is None and "/tmp/base" in card.text

    @each("facts", [{"license": 10**5000}, {"tags": ["REFUSE"]}], ids=["by str", "by the Hub"])
    def test_a_card_that_is_refused_blocks_nothing(self, model, tmp_path, caplog, facts):
        push = pushing(tmp_path, **facts)
        fit_in_order(model, callbacks=[push])
        assert "README.md" not in on_hub()
        assert re.search("No model card was written|without the model card", caplog.text)
        assert_pushed(push)

class TestCardIsTrue:
    @BOTH
    def test_the_best_model_is_pushed_with_its_results_when_early_stopping_restores_it(
            self, keras, tmp_path, strategy):
        model, scores, weights = small_model(keras), iter([0.5, 0.9, 0.1, 0.2]), []
        push, patience = pushing(tmp_path, save_strategy=strategy, **FACTS), 2 - (strategy != "no")
        fit_in_order(model, epochs=9, callbacks=[
            KerasMetricCallback(lambda p, l: {"f1": next(scores)}, (X, Y), batch_size=8),
            at_epoch_end(lambda epoch: weights.append(model.get_weights()), keras),
            keras.callbacks.EarlyStopping("f1", 0, patience, 0, "max", restore_best_weights=True),
            push,
        ])
        card = card_on_hub(push)
        assert results_on(card) == {"f1": 0.9} and "Results of epoch 1" in card.text
        assert_equal(load(keras, downloaded(push)).get_weights(), weights[1])

    @each("index", [0, -1], ids=["a row of a table", "an average of a normalization"])
    def test_every_variable_takes_part_in_telling_epochs_apart(self, keras, tmp_path, index):
        of, half = keras.layers, {"dtype": "bfloat16"}
        layers = [of.Input((1,)), of.Embedding(70_000, 2), of.Flatten(), of.Dense(3, **half)]
        model = keras.Sequential([*layers, of.BatchNormalization()])
        push = pushing(tmp_path, save_strategy="no", **FACTS)
        begin(push, model, epochs=2)
        first, second = model.get_weights(), model.get_weights()
        second[index].flat[-1] += 1  # the others stay as they are
        for epoch, weights in enumerate([first, second]):
            model.set_weights(weights)
            push.on_epoch_end(epoch, {"f1": epoch / 2})
        for expected, weights in ({"f1": 0.5}, second), ({"f1": 0.0}, first):
            model.set_weights(weights)
            push.on_train_end()
            assert results_on(card_on_hub(push)) == expected

    @each("how", ["an average", "another callback", "in the middle of an epoch"])
    def test_weights_of_no_epoch_claim_no_results(self, keras, tmp_path, how):
        model = small_model(keras, keras.optimizers.Adam(0.1, use_ema=how == "an average"))
        add = lambda logs: model.set_weights([weight + 1 for weight in model.get_weights()])
        changing = keras.callbacks.LambdaCallback(on_train_end=add if "another" in how else None)
        strategy = {"save_strategy": "steps", "save_steps": 5} if "middle" in how else {}
        push = pushing(tmp_path, **strategy, **FACTS)
        fit_in_order(model, epochs=2, callbacks=[measuring([]), changing, push])
        card = card_on_hub(push, 1 if "middle" in how else -1)  # after batch 5; an epoch has three
        assert (card.data.eval_results, card.data.metrics) == (None, None)
        assert "The results of exactly these weights are not known." in card.text

    @each("package", ["", "tcn", *[pytest.param("keras_hub", id="KerasHub")] * has("keras_hub")])
    def test_the_code_imports_and_loads_the_model(self, keras, tmp_path, monkeypatch, package):
        text = f"import {keras.__name__} as keras\n@keras.saving.register_keras_serializable()\n"
        write_files(tmp_path, "tcn.py", text=text + "class TCN(keras.layers.ReLU): pass")
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("tcn", None)
        of, parts = keras.layers, importlib.import_module(package or "keras")
        layers = [parts.TCN()] if package == "tcn" else [of.Lambda(lambda x: x * 2)]
        if package == "keras_hub":
            layers = [of.Reshape((4, 1)), parts.layers.PositionEmbedding(4), of.Flatten()]
        model, push = keras.Sequential([of.Input((4,)), *layers, of.Dense(3)]), pushing(tmp_path)
        model.compile("adam", LOSS)
        fit_in_order(model, callbacks=[push])
        keras.saving.get_custom_objects().pop("Custom>TCN", None)
        sys.modules.pop("tcn", None)  # as in a new process
        code, found = re.search(r"```python\n(.*?)```", card_on_hub(push).text, re.DOTALL)[1], {}
        exec(code, found)
        assert_equal(found["model"].predict(X, verbose=0), model.predict(X, verbose=0))
        assert re.search(rf"^import .*\b{package}\b", code, re.MULTILINE)
        assert ("safe_mode=False" in code) is (package == "")
        assert not re.search("your_code|custom_objects|__main__", code)

class TestCardOfAHuman:
    @each("stage", ["info", "preupload", "lfs", "commit", *["no commit"] * bool(KERAS3)])
    def test_what_a_human_changes_on_the_hub_during_an_upload_stays_through_all_later_saves(
            self, push, model, monkeypatch, stage):
        again = stage == "no commit"  # since the same is saved once more; Keras writes the date
        if again:
            now = types.SimpleNamespace(now=lambda: types.SimpleNamespace(strftime=str))
            date = types.SimpleNamespace(datetime=now)
            monkeypatch.setattr("keras.src.saving.saving_lib.datetime", date)
        saved(push)
        fault = hub.add_fault("preupload" if again else stage, "wait")
        push.on_epoch_end(0 if again else 1, {"loss": 1.0})
        assert fault.reached.wait(60)
        hub.commit(push.hub_model_id, "By hand", HUMAN)
        fault.release.set()
        push.last_job.result(timeout=60)
        assert (commits(push)[-1] == "By hand") is again
        fit_in_order(model, callbacks=[push])
        assert pushed(push).items() >= HUMAN.items()
        assert_pushed(push)

@each("place", ["on the Hub", "in the folder"])
class TestCardOfOthers:
    THEIRS = "---\nlicense: apache-2.0\n---\n<!-- This model card has been generated automatically "
    THEIRS += "according to the information Keras had access to. You should\nread it. -->\n# old\n"
    KEYS = "---\nlicense: apache-2.0\ntags:\n- mine\nextra_gated_prompt: ask me\n---\n"

    def push_over(self, card, place, folder, repo, **facts):
        """A callback for a place where this card is already."""
        hub.commit(f"user/{repo}", "first", {"README.md": card.encode()} if "Hub" in place else {})
        if "Hub" not in place:
            write_files(folder / repo, "README.md", text=card)
        return pushing(folder, repo, **facts)

    @each("card", [THEIRS, "", KEYS, KEYS.replace("\n", "\r\n") + "\r\n\r\n"])
    def test_a_generated_card_is_replaced_and_one_of_metadata_alone_keeps_its_keys(
            self, model, tmp_path, repo, place, card):
        facts = {"license": "mit", **FACTS}
        push = self.push_over(card, place, tmp_path, repo, **facts)
        fit_in_order(model, epochs=2, callbacks=[push, awaiting(push)])
        fit_in_order(model, callbacks=[pushing(tmp_path, repo, **facts)])  # a further run
        for made in (card_on_hub(push, 2), card_on_hub(push, 3), card_on_hub(push)):
            assert made.data.license == ("apache-2.0" if "mine" in card else "mit")
            assert ("extra_gated_prompt: ask me" in made.content) is ("mine" in card)
            assert made.data.pipeline_tag and rows_of(made.text) and "# old" not in made.text

    def test_a_humans_card_is_named_once(self, model, tmp_path, repo, place, caplog):
        push = self.push_over(HUMAN["README.md"].decode(), place, tmp_path, repo)
        caplog.clear()
        fit_in_order(model, epochs=3, callbacks=[push, awaiting(push)])
        assert pushed(push)["README.md"] == HUMAN["README.md"]
        assert "Hub" in place or contents(push.output_dir)["README.md"] == HUMAN["README.md"]
        ((level, message),) = logged(caplog)
        assert level == "WARNING" and re.search("README.md|card", message)

# Faults --------------------------------------------------------------------------------------
class Clock:
    """Time that passes only while somebody waits for the next try."""

    def __init__(self):
        self.seconds, self.now, self.meanwhile = 0.0, lambda: self.seconds, lambda event: None
        self.waits = []

    def wait(self, event, seconds):
        self.waits.append(seconds)
        self.seconds += seconds
        self.meanwhile(event)
@pytest.fixture
def clock(monkeypatch):
    """A clock that costs nothing, with the waits and limits that the README tells."""
    limits = dict(FIRST_WAIT=1.0, BACKGROUND_SECONDS=60.0, FINAL_SECONDS=300.0, _clock=Clock())
    for name, value in limits.items():
        monkeypatch.setattr(kc, name, value)
    return kc._clock
raising = lambda error: lambda *of, **options: (_ for _ in ()).throw(error)
def once_training_waits(action):
    """Calls the action, in a thread, when the main thread waits in on_train_end for something."""
    def run(main=threading.main_thread().ident, looks=0):
        while looks < 5:  # in a row: a signal before it sleeps does not wake it
            threading.Event().wait(0.01)
            frames = traceback.walk_stack(sys._current_frames()[main])
            names = [frame.f_code.co_name for frame, _ in frames]  # of futures, not of a start
            looks = looks + 1 if names[:3] == ["wait"] * 3 and "on_train_end" in names else 0
        action()
    threading.Thread(target=run, daemon=True).start()
def end(push, strategy):
    """Saves during training or at its end; returns what the push failed of, or None."""
    push.on_train_end() if strategy == "no" else push.on_epoch_end(0)
    return push.last_job.exception(timeout=60)
# The client itself waits a second before it repeats some of these, so there are fewer of them.
PASSING = {"info": (500, 503, 429, 408, "drop", "lost"), "preupload": (503,), "batch": (503,)}
PASSING |= {"lfs": (503, 429, "drop"), "any": ("drop",)}  # as from a Hub that comes up again
PASSING |= {"commit": (500, 503, 429, 408, "drop", "lost", 409, 412, 423, 425)}
REFUSALS = [("info", 404), ("preupload", 403), ("batch", 403), ("lfs", 403), ("lfs", 413)]
REFUSALS += [("commit", 401), ("commit", 413), ("commit", 429, {"Retry-After": "86400"})]
REFUSALS += [("commit", 429, {"RateLimit": '"api";r=0;t=86400'})]  # not today
LASTING = [("info", 500), ("commit", 503), ("commit", "drop"), ("any", "down")]

class TestFaults:
    @BOTH
    @each("stage, kind", [(s, kind) for s in PASSING for kind in PASSING[s]])
    def test_a_passing_fault_costs_a_save_nothing(self, push, stage, kind, strategy):
        fault = hub.add_fault(stage, kind, times=3 if stage == "any" else 1)
        assert end(push, strategy) is None and fault.times == 0
        assert_pushed(push)

    @BOTH
    @each("fault", REFUSALS + LASTING, ids=lambda fault: " ".join(map(str, fault)))
    def test_a_refusal_at_once_and_a_fault_that_lasts_cost_one_line_in_the_log_and_this_push_only(
            self, model, tmp_path, repo, caplog, monkeypatch, fault, strategy):
        (stage, kind, *headers), is_refusal = fault, fault in REFUSALS
        push, url = pushing(tmp_path, repo), f"{hub.url}/user/{repo}"
        begin(push, model)
        for name in ("BACKGROUND_SECONDS", "FINAL_SECONDS") * (not is_refusal):
            monkeypatch.setattr(kc, name, len(name) / 100)
        hub.down, before = kind == "down", asked(stage)
        fault = hub.add_fault(stage, kind, times=1000, headers=dict(*headers))
        error = end(push, strategy)
        assert WRITE not in caplog.text + repr(error) + str(vars(push))  # the token
        told = {"epoch": f'WARNING.*epoch 0" was not pushed to {url}: .*{push.output_dir}',
                "no": f"ERROR.*could not be pushed to {url}: (.|\\n)*upload_folder\\(repo_id"}
        assert re.match(told[strategy], " ".join(*logged(caplog)))
        assert kind in ("drop", "down") or str(kind) in caplog.text
        assert not is_refusal or asked(stage) - before == 1
        assert_pushed(push, folder=push.output_dir)
        hub.down, fault.times = False, 0
        saved(push, 1)
        assert commits(push) == ["Training in progress, epoch 1"]

    @each("stage", ["info", "lfs", "commit"])
    def test_the_wait_for_a_silent_hub_ends(self, push, model, monkeypatch, caplog, stage):
        late = hub.add_fault(stage, "wait")
        with monkeypatch.context() as patch:
            patch.setattr(kc, "SLOWEST_LINK", 1e12)
            patch.setattr(kc, "FINAL_SECONDS", 0.2)
            push.on_train_end()
        ((level, message),), job = logged(caplog), push.last_job
        assert level == "ERROR" and "could not be pushed" in message
        once_training_waits(late.release.set)
        fit_in_order(model, callbacks=[push])
        concurrent.futures.wait([job], 60)
        assert_pushed(push)

    @each("strategy, limit, longest", [("epoch", 60, 16), ("no", 300, 30)])
    def test_waits_double_with_jitter_up_to_half_a_minute_until_the_limit_after_the_first_failure(
            self, push, monkeypatch, clock, strategy, limit, longest):
        jumps, route = iter([1000]), hub.route  # so long it takes to the first failure
        jump = lambda: setattr(clock, "seconds", clock.seconds + next(jumps, 0))
        monkeypatch.setattr(hub, "route", lambda *of: jump() or route(*of))
        hub.add_fault("commit", 500, times=1000)
        clock.meanwhile = lambda event: clock.seconds > limit + 999.9 and hub.faults.clear()
        assert end(push, strategy) is None
        assert clock.seconds == pytest.approx(limit + 1000)
        factors = [wait / 2**tries for tries, wait in enumerate(clock.waits[:4])]
        assert 1 <= min(factors) < max(factors) - 1e-6 and max(factors) <= 2
        assert longest <= max(clock.waits) <= 2 * longest

    @each("seconds, headers", [
        (7, {"Retry-After": "7"}),
        (200, {"RateLimit": '"api";r=0;t=200', "RateLimit-Policy": '"api";q=1000;w=300'}),
    ])
    def test_the_wait_that_the_hub_asks_for_is_honoured(self, push, clock, seconds, headers):
        hub.add_fault("commit", 429, headers=headers)
        push.on_train_end()
        assert seconds <= clock.seconds < seconds + 20
        assert commits(push) == ["End of training"]

    @each("fault, error, match", [
        (("create", 503, 2), None, None),
        (("create", 403, 1000), huggingface_hub.utils.HfHubHTTPError, "403"),
        (None, ConnectionError, re.escape(f"{HUB_URL or hub.url} could not be reached")),
    ], ids=["comes back", "refuses", "down"])
    def test_a_repository_is_created_by_a_hub_that_comes_back_or_the_error_names_it(
            self, tmp_path, clock, fault, error, match):
        hub.down = fault is None
        fault = fault and hub.add_fault(*fault)
        with pytest.raises(error, match=match) if error else contextlib.nullcontext():
            pushing(tmp_path)
        assert ("user/model" in hub.repos) is (error is None)
        assert clock.seconds == 0 if match == "403" else 1 < clock.seconds < 60

    def test_offline_is_said_at_once(self, push, model, tmp_path, clock, caplog, monkeypatch):
        renew = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)  # of older clients
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            stack.callback(lambda: patch.undo() or renew())
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", renew() is None)
            for need in (pushing, lambda *of: load_repo_checkpoint(model, "user/one")):
                with pytest.raises(ConnectionError, match="(?i)offline"):
                    need(tmp_path, "other")
            assert all("ffline" in str(end(push, strategy)) for strategy in ("epoch", "no"))
        assert [level for level, _ in logged(caplog)] == ["WARNING", "ERROR"]
        assert (clock.seconds, asked("commit")) == (0, 0)

    def test_a_cache_that_cannot_be_written_is_said_at_once_and_not_called_unreachable(
            self, push, model, monkeypatch, clock):
        saved(push)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", __file__ + "/cache")
        with pytest.raises(OSError, match=re.escape(__file__)) as raised:
            load_repo_checkpoint(model, push.hub_model_id, token=WRITE)
        assert "reached" not in str(raised.value) and clock.seconds == 0

class Tokenizer:
    """Writes two files that tell its number, and between them does what it is told to."""

    def __init__(self, number=0):
        self.number, self.between = number, lambda: None

    def save_pretrained(self, folder):
        pathlib.Path(folder, "a_vocab.txt").write_text(str(self.number))
        self.between()
        pathlib.Path(folder, "b_vocab.txt").write_text(str(self.number))
def big_model(optimizer=None):
    """A model of 5 MB that is not compiled, or is trained with Adam of 15 MB."""
    model = FIRST.Sequential([FIRST.layers.Input((1250,)), FIRST.layers.Dense(1000)])
    if optimizer:
        model.compile(optimizer, "mse")
        model.fit(np.zeros((1, 1250)), np.zeros((1, 1000)), verbose=0)
    return model

class TestSavingFails:
    @each("error, match", [
        (OSError("no vocabulary"), "write .*{}: OSError: no vocabulary.*" + kc.RESCUED),
        (KeyboardInterrupt("Ctrl-C"), "Ctrl-C"), (None, "write .*{}: .*No space left"),
    ], ids=["an error", "Ctrl-C", "a full disk"])
    def test_what_cannot_be_written_is_named(self, push, model, monkeypatch, error, match):
        push.tokenizer = Tokenizer()
        saved(push)
        before = contents(push.output_dir)
        raised = KeyboardInterrupt if match == "Ctrl-C" else RuntimeError
        with monkeypatch.context() as patch:
            patch.setattr(push.tokenizer, "between", raising(error))
            if error is None:  # enough for the model, but not for what Adam remembers of it
                patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1e7))
                push.set_model(big_model("adam"))
            with pytest.raises(raised, match=match.format(push.output_dir)):
                push.on_epoch_end(1, {})
        rescued = {kc.RESCUED} if isinstance(error, OSError) else set()
        assert contents(push.output_dir).keys() - before.keys() == rescued
        assert contents(push.output_dir).items() >= before.items()
        push.set_model(model)
        saved(push, 2)
        assert_pushed(push)
        assert not leftovers(push.output_dir) and kc.RESCUED not in pushed(push)

    @each("taken, epochs", [(0, 3), (7_000_000, 3), (9_000_000, 0)])  # by a file of the user's
    def test_on_a_small_disk_training_goes_on_and_the_model_is_pushed(
            self, tmp_path, caplog, taken, epochs):
        mount = ["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(tmp_path)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a disk of 18 MB")
        try:
            push, fault = pushing(tmp_path), hub.add_fault("commit", "wait")
            begin(push, big_model())
            (push.output_dir / "huge.bin").write_bytes(bytes(taken))  # which fits once, not twice
            for epoch in range(epochs):
                push.on_epoch_end(epoch, {})
                if taken:  # a push beside the next save does not fit
                    assert "No space left" in str(push.last_job.exception(timeout=60))
                assert taken or fault.reached.wait(60)
            fault.release.set()
            push.on_train_end()  # the last save is not copied
            (push.output_dir / "huge.bin").unlink(missing_ok=True)  # it was left out, as is told
            assert_pushed(push)
            assert [at for at, _ in logged(caplog)] == ["WARNING"] * (epochs + 1) * (taken > 0)
        finally:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)

class TestLastStateWins:
    def test_an_older_state_makes_way_for_a_newer_one(self, push, model, clock):
        waiting = threading.Event()
        clock.meanwhile = lambda event: waiting.set() or event.wait(60)
        hub.add_fault("commit", 503)
        push.on_epoch_end(0)
        assert waiting.wait(60)
        fit_in_order(model, callbacks=[pushing(push.output_dir.parent, push.output_dir.name)])
        assert push.last_job.exception(timeout=60) is not None
        assert commits(push) == ["End of training"]
        assert_pushed(push)

    @each("stage", ["copy", "yaml"])
    def test_an_older_state_that_takes_long_is_not_committed_after_a_newer_one(
            self, tmp_path, model, monkeypatch, stage):
        def copy_slowly(*paths, copy=shutil.copyfile):
            if not slow.reached.is_set():
                slow.reached.set()
                slow.release.wait(60)
            return copy(*paths)
        push, slow = pushing(tmp_path, tags=["REFUSE"]), hub.add_fault(stage, "wait")
        begin(push, model)
        monkeypatch.setattr(shutil, "copyfile", copy_slowly if stage == "copy" else shutil.copyfile)
        monkeypatch.setattr(kc, "BACKGROUND_SECONDS", 0.1)
        monkeypatch.setattr(kc, "SLOWEST_LINK", 1e12)
        push.on_epoch_end(0, {})
        assert slow.reached.wait(60)
        fit_in_order(model, callbacks=[pushing(tmp_path)])
        slow.release.set()
        assert push.last_job.exception(timeout=60) is not None
        assert commits(push) == ["End of training"]

    @each("name", [WEIGHTS, "README.md", "all files"])
    @each("stage", ["info", "preupload", "lfs", "commit"])
    def test_a_snapshot_that_is_changed_or_removed_is_neither_committed_torn_nor_called_pushed(
            self, push, caplog, stage, name):
        fault = hub.add_fault(stage, "wait")
        push.on_epoch_end(0, {"loss": 1.0})
        assert fault.reached.wait(60)
        if name == "all files":  # as `git clean -fdx` does
            shutil.rmtree(*leftovers(push.output_dir))
        else:
            (push.output_dir / name).write_bytes(b"torn")
        fault.release.set()
        failed = push.last_job.exception(timeout=60) is not None
        made = [commit["files"] for commit in hub.repos[push.hub_model_id][1:]]
        assert all(WEIGHTS in files for files in made)  # whole, where it was sent by then
        assert not [files for files in made if b"torn" in files.values()]
        assert (made or failed) and ("epoch 0" in caplog.text) is failed
        push.on_train_end()
        assert_pushed(push)

class TestWhatCannotBeSaved:
    @each("part", ["layer", "unbuilt layer", "schedule", "tokenizer"])
    def test_is_refused_before_the_first_batch(self, keras, tmp_path, part):
        rate, tokenizer = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9), Tokenizer()
        model = small_model(keras, keras.optimizers.Adam(rate))
        if "unbuilt" in part:
            model = keras.Sequential([keras.layers.Dense(3)])
            model.compile("adam", LOSS)
        stubborn = {"schedule": rate, "tokenizer": tokenizer}.get(part, model.layers[-1])
        method = "between" if part == "tokenizer" else "get_config"
        setattr(stubborn, method, raising(NotImplementedError("no config of mine")))
        count = keras.callbacks.LambdaCallback(on_train_batch_begin=raising(AssertionError))
        with pytest.raises(RuntimeError, match="(?i)config|serial"):
            fit_in_order(model, callbacks=[count, pushing(tmp_path, tokenizer=tokenizer)])
        assert contents(tmp_path) == {}

    @BOTH
    def test_the_weights_are_rescued_when_a_save_fails(self, keras, tmp_path, strategy):
        model, other, fail = small_model(keras), small_model(keras), raising(NotImplementedError())
        turn = at_epoch_end(lambda epoch: setattr(model.layers[-1], "get_config", fail), keras)
        push = pushing(tmp_path, save_strategy=strategy)
        with pytest.raises(RuntimeError, match=str(push.output_dir / kc.RESCUED)):
            fit_in_order(model, epochs=2, callbacks=[turn, push])
        other.optimizer.build(other.trainable_variables)
        other.load_weights(push.output_dir / kc.RESCUED)
        assert_equal(state_of(other), state_of(model))

class TestSlowUploads:
    @each("stage", ["preupload", "lfs", "commit"])
    def test_training_goes_on_and_each_commit_is_one_whole_save_the_newest(
            self, push, stage, monkeypatch, caplog):
        monkeypatch.setattr(kc, "FINAL_SECONDS", 0.0)  # the wait allows for the bytes
        monkeypatch.setattr(kc, "SLOWEST_LINK", 100)
        fault, seen = hub.add_fault(stage, "wait"), []

        def look(epoch):
            seen.append([assert_one_save(push.output_dir), *commits(push)])
            if epoch == 3:
                assert not push.last_job.cancel()  # so that fit cannot hang
                fault.release.set()
                push.last_job.result(timeout=60)
                once_training_waits(hub.add_fault(stage, "wait").release.set)
        fit_in_order(push.model, epochs=6, callbacks=[push, at_epoch_end(look)])
        progress = [f"Training in progress, epoch {epoch}" for epoch in (0, 4)]
        assert seen == [[0], [1], [2], [3], [4, progress[0]], [5, progress[0]]]
        assert commits(push) == [*progress, "End of training"]
        assert [assert_one_save(downloaded(push, index)) for index in (1, 2, 3)] == [0, 4, 5]
        assert_pushed(push)
        assert logged(caplog) == leftovers(push.output_dir) == []

class TestInterrupts:
    @each("at_end", [False, True], ids=["in training", "in the wait at its end"])
    def test_an_interrupted_fit_leaves_the_folder_whole_and_the_callback_usable(
            self, push, model, caplog, at_end):
        stop = at_epoch_end(lambda epoch: epoch == 1 and raising(KeyboardInterrupt)())
        fault = hub.add_fault("commit", "wait", of=push.hub_model_id)  # not of an earlier test
        sent = at_epoch_end(lambda epoch: fault.reached.wait(60))
        if at_end:  # while it waits for the upload
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
            once_training_waits(lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            fit_in_order(model, epochs=2, callbacks=[push, sent] + [stop] * (not at_end))
        told = re.search(rf"final state(.|\n)*upload_folder\(.*{push.hub_model_id}", caplog.text)
        assert (told is not None, assert_one_save(push.output_dir)) == (at_end, 1)
        fault.release.set()
        concurrent.futures.wait([push.last_job], 60)
        assert commits(push)[0] == "Training in progress, epoch 0"
        fit_in_order(model, callbacks=[push])
        assert_pushed(push)
        assert len(push.training_history) == 1 and not leftovers(push.output_dir)

    @each("place, error", [
        ((os, "replace"), KeyboardInterrupt), ((threading.Thread, "start"), KeyboardInterrupt),
        ((threading.Thread, "start"), RuntimeError),
    ])
    def test_an_upload_that_cannot_begin_leaves_no_folder_and_does_not_hold_up_the_next_one(
            self, push, model, monkeypatch, caplog, place, error):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(*place, raising(error("can't start")))
            push.on_epoch_end(0)
            assert error is RuntimeError
            ((level, message),) = logged(caplog)
            assert level == "WARNING" and "can't start" in message
        assert not leftovers(push.output_dir)
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
    arm = at_epoch_end(lambda epoch: ready and ready.wait(60) and sys.addaudithook(watch))
    fit_in_order(small_model(FIRST), epochs=2, callbacks=[push, arm])

class TestKill:
    __test__ = BACKEND == "tensorflow" and hasattr(os, "fork")

    # After the checkpoint is written, and before the third move.
    @each("event, pattern, number", [("open", r"README\.md'\)?, 'w", 1), ("os.rename", "", 3)])
    def test_a_kill_while_saving_and_pushing_leaves_whole_files_and_the_next_run_finishes(
            self, tmp_path, repo, monkeypatch, event, pattern, number):
        monkeypatch.setenv("STAND_IN_HUB", hub.url)
        context = multiprocessing.get_context("forkserver")  # of a TensorFlow that has done nothing
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
        load(FIRST, folder)
        assert event != "open" or assert_one_save(folder) == 0  # before the first move
        left = leftovers(folder)
        train_and_die(folder, 2)
        assert left and leftovers(folder) == left  # for a day
        assert assert_one_save(folder) == 1
        assert {(folder / f"{letter}_vocab.txt").read_text() for letter in "ab"} == {"2"}
        for index in range(1, len(hub.repos[f"user/{repo}"])):
            last = assert_one_save(download(tmp_path / str(index), repo, index))
        assert last == 1 and not [name for name in on_hub(repo) if name.startswith(kc.PRIVATE)]

# Ecosystems ----------------------------------------------------------------------------------
BERT, BART = "TFBertForSequenceClassification", "TFBartForSequenceClassification"
GPT2, T5 = "TFGPT2LMHeadModel", "TFT5ForConditionalGeneration"
SPEECH, BLIP = "TFWhisperForConditionalGeneration", "TFBlipForConditionalGeneration"
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
SIZES |= dict(encoder_layers=1, decoder_layers=1, decoder_attention_heads=2, num_decoder_layers=1)
SIZES |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, d_kv=8, d_ff=16, vocab_size=40)  # of any
SIZES |= dict(max_position_embeddings=32, max_source_positions=6, max_target_positions=32)
SIZES |= dict(image_size=8, patch_size=4, num_channels=3, projection_dim=16, num_mel_bins=4)
SIZES |= dict(image_text_hidden_size=16, suppress_tokens=None, begin_suppress_tokens=None)
SIZES |= dict(pad_token_id=0, decoder_start_token_id=0, bos_token_id=1, eos_token_id=2)
ENDS = {"max_new_tokens": 6, "eos_token_id": list(range(3, 40, 4))}  # so that lengths differ
TEXT, IMAGE = ["input_ids", "attention_mask"], ["pixel_values"]
def tiny(kind, **options):
    """A small transformers model of random weights, large enough ones for its outputs to differ."""
    import transformers
    cls = getattr(transformers, kind) if isinstance(kind, str) else kind
    parts = dict(text_config=SIZES, vision_config=SIZES) if kind == BLIP else {}
    model = cls(cls.config_class(**SIZES | parts | options))
    model.build_in_name_scope()
    rng, scale = np.random.default_rng(18), 0.8 if kind == BLIP else 0.4
    model.set_weights([rng.normal(size=w.shape, scale=scale) for w in model.get_weights()])
    return model
def batches_for(kind, classes=0):
    """Batches of what a model takes, of three widths; labels are classes of examples or tokens."""
    rng, batches = np.random.default_rng(3), []
    for lengths in [(5, 3, 4), (7, 2), (4,)]:
        spans = np.arange(max(lengths)) < np.array(lengths)[:, None]
        mask = (spans[:, ::-1] if kind == GPT2 else spans).astype("int32")
        tokens, labels = rng.integers(10, 40, mask.shape, "int32"), rng.integers(0, 40, mask.shape)
        batch = {"input_ids": np.where(mask, tokens, 9), "attention_mask": mask}  # 9 is no text
        if kind == SPEECH:
            batch = {"input_features": rng.normal(size=(len(mask), 4, 12)).astype("float32")}
        if kind == BLIP:
            batch["pixel_values"] = rng.normal(size=(len(mask), 3, 8, 8)).astype("float32")
        labels = rng.integers(0, classes, len(mask)) if classes else np.where(mask, labels, -100)
        batches.append({**batch, "labels": labels})
    return batches
def one_by_one(batches):
    """The examples of the batches, each as a batch of one, as wide as the batch it comes from."""
    rows = lambda batch: range(len(next(iter(batch.values()))))
    return [{n: c[i : i + 1] for n, c in batch.items()} for batch in batches for i in rows(batch)]
without_labels = lambda batch: {n: column for n, column in batch.items() if n != "labels"}
GIVEN = {  # ways to give a batch to fit
    "pair": lambda x: (without_labels(x), x["labels"]),
    "tuple": lambda x: ((x["input_ids"], x["attention_mask"]), x["labels"]),
    "texts": lambda x: (without_labels(x), {name: x[name][:, :2] for name in TEXT}),
    "dict": dict, "inputs": without_labels, "copy": lambda x: {**x, "labels": x["input_ids"]},
    "prompts": lambda x: ({**without_labels(x), "decoder_input_ids": x["labels"] % 7}, x["labels"]),
    "shifted": lambda x: ({**without_labels(x), "decoder_input_ids": np.maximum(
        np.insert(x["labels"], 0, 0, axis=1)[:, :-1], 0)}, x["labels"]),
}
generated = functools.partial(evaluate, predict_with_generate=True)
def loaded_by_card(push):
    """The names that the Python of the card on the Hub defines, which is run as it stands."""
    exec(re.search(r"```python\n(.*?)```", text_of_card(push), re.DOTALL)[1], names := {})
    return names

@pytest.mark.filterwarnings("ignore:The initializer .* is unseeded and being:UserWarning")
class TestTransformers:  # against one example at a time, called by name and eagerly
    __test__ = has("transformers", "tf_keras", "datasets", "rouge_score")

    CALLS = [  # of a subclass, given the call of transformers' own
        lambda call: lambda self, *args, **more: call(self, *args, **more),
        lambda call: lambda self, input_ids=None, training=0, **more: call(self, input_ids, **more),
        lambda call: lambda self, inputs, training=0: call(self, *(inputs[name] for name in TEXT)),
    ]
    KINDS = [(BERT, 2, "dict"), (GPT2, 0, "dict"), (T5, 0, "pair"), (T5, 0, "tuple")]

    @each("kind, classes, given, override", [
        *((*kind, None) for kind in KINDS), *((BERT, 2, "dict", call) for call in CALLS),
    ])
    def test_predictions_equal_those_of_one_example_at_a_time(self, kind, classes, given, override):
        model, examples = tiny(kind), one_by_one(batches_for(kind, classes))
        expected = padded([model(example).logits.numpy()[0] for example in examples])
        if override:
            model = tiny(type("Own", (type(model),), {"call": override(type(model).call)}))
        data = as_pipeline(list(map(GIVEN[given], batches_for(kind, classes))))
        options = {"output_cols": "logits"} if kind == T5 else {}
        logits, labels = evaluate(model, data, **options)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        targets = [example["labels"][0] for example in examples]
        np.testing.assert_array_equal(labels, targets if classes else padded(targets))
        assert (logits.dtype, labels.dtype) == (np.float32, np.int64)

    @each("labels", [np.eye(3)[Y[:4]], (Y[:4] + 100, np.array(["yes", "no"] * 2))])
    def test_a_classifier_that_makes_decoder_inputs_of_its_inputs_gets_no_labels(self, labels):
        model, ids = tiny(BART, num_labels=3), RNG.integers(10, 40, (4, 5))
        ids[:, 3] = 2  # the end, which its head looks for
        received = evaluate(model, in_batches({"input_ids": ids}, labels), output_cols="logits")
        expected = [model(row[None]).logits.numpy()[0] for row in ids]
        np.testing.assert_allclose(received.predictions, expected, atol=1e-4)
        assert_equal(received.labels, labels)

    def test_the_rouge_recipe_of_the_readme_runs_and_the_code_of_the_card_loads_what_it_trained(
            self, tmp_path):
        import datasets
        import transformers
        words, file = "petal iris tumor cell lily leaf".split(), tmp_path / "vocabulary"
        file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        tokenizer = transformers.BertTokenizerFast(str(file), model_input_names=TEXT)
        texts, targets = ([" ".join(words[n::step]) for n in range(6)] for step in (2, 1))
        encoded = tokenizer(texts, text_target=targets, padding="max_length", max_length=16)
        model = tiny(T5, vocab_size=len(tokenizer), dropout_rate=0.0)
        model.set_weights([weight / 2 for weight in model.get_weights()])
        model.compile("adam")
        collate = transformers.DataCollatorForSeq2Seq(tokenizer, model, return_tensors="np")
        options = dict(batch_size=4, shuffle=False, drop_remainder=False, collate_fn=collate)
        data = model.prepare_tf_dataset(datasets.Dataset.from_dict(dict(encoded)), **options)
        given = dict(model=model, tokenizer=tokenizer, train_dataset=data, eval_dataset=data)
        names = run_readme_block("RougeScorer", tmp_path, **given)
        push, scores = pushing(tmp_path, tokenizer=tokenizer), []
        begin(push, model)
        push.on_train_end()
        loaded = loaded_by_card(push)
        assert_equal(loaded["model"].get_weights(), model.get_weights())
        for text, target in zip(texts, targets):
            inputs = loaded["tokenizer"](text, return_tensors="tf")
            (tokens,) = loaded["model"].generate(**inputs, max_new_tokens=16)
            answer = loaded["tokenizer"].decode(tokens, skip_special_tokens=True)
            scores.append(names["scorer"].score(target, answer)["rouge1"].fmeasure)
        assert 0 < 100 * np.mean(scores) == pytest.approx(model.history.history["rouge1"][0])

    def test_training_resumes_bitwise(self, tmp_path):
        from transformers import create_optimizer
        ids = np.random.default_rng(1).integers(5, 40, (16, 6), "int32")
        data = in_batches({"input_ids": ids}, ids.sum(1) % 2, size=4)
        fit = lambda model, **options: model.fit(data, verbose=0, **options)

        def make():
            model = tiny(BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model.compile(create_optimizer(0.01, 16, num_warmup_steps=4, weight_decay_rate=0.1)[0])
            assert type(model.optimizer).__name__ == "AdamWeightDecay"
            return model
        assert_resumes(make, tmp_path, fit, before_loading=fit)  # which makes its variables

    QUESTIONS = {  # a model, the columns that it is to start from, how data are given, options
        "text": (T5, TEXT, "pair", {"output_cols": ["nosuch"]}),  # without effect on bare tokens
        "text padded left": (GPT2, TEXT, "dict", {}),
        "speech": (SPEECH, ["input_features"], "dict", {}),
        "the main input by name": (T5, TEXT, "inputs", {"label_cols": TEXT}),
        "labels called like inputs": (T5, TEXT, "texts", {"label_cols": TEXT}),
        "labels shifted": (T5, TEXT, "shifted", {}), "prompts": (T5, TEXT, "prompts", {}),
        "caption by name": (BLIP, IMAGE, "inputs", {"label_cols": "input_ids"}),
        "labels like the caption": (BLIP, IMAGE + TEXT, "copy", {}),
    }

    @each("kind, asked, given, options", QUESTIONS.values(), ids=QUESTIONS)
    def test_generation_starts_from_the_question_alone_and_withheld_prompts_are_named_once(
            self, caplog, kind, asked, given, options):
        model, settings = tiny(kind), {"max_new_tokens": 4} if kind == BLIP else ENDS
        questions = [{name: x[name] for name in asked} for x in one_by_one(batches_for(kind))]
        rows = [model.generate(**question, **settings).numpy()[0] for question in questions]
        assert len({len(row) for row in rows}) > 1 or kind == BLIP
        data = as_pipeline(list(map(GIVEN[given], batches_for(kind))))
        options = dict(predict_with_generate=True, generate_kwargs=settings, **options)
        begin(callback := measuring(received := [], data, **options), model)
        callback.on_epoch_end(0)
        np.testing.assert_array_equal(received[0].predictions, padded(rows, 0))
        assert received[0].predictions.dtype == rows[0].dtype
        said = [level for level, text in logged(caplog) if "decoder_input_ids" in text]
        assert said == ["WARNING"] * (given == "prompts")

    @pytest.mark.filterwarnings("ignore:You have modified the pretrained model config:UserWarning")
    @each("kind", [GPT2, SPEECH])
    def test_xla_compiles_once_for_all_batches_and_weights_and_anew_for_a_fit_with_other_settings(
            self, kind):
        from transformers import TFRepetitionPenaltyLogitsProcessor as Penalty
        model, received, traces = tiny(kind, eos_token_id=None), [], []
        batch, generate = without_labels(batches_for(kind)[0]), model.generate
        model.generate = lambda *args, **options: traces.append(1) or generate(*args, **options)
        options = dict(predict_with_generate=True, use_xla_generation=True, batch_size=2)
        callback = measuring(received, (batch, np.zeros(3)), **options)  # batches of 2 and 1
        kwargs, repeat = callback.generate_kwargs, Penalty(0.1)
        turn = lambda: model.set_weights([weight[..., ::-1] for weight in model.get_weights()])
        changes = [  # what changes before a fit, and whether that takes a compilation
            (lambda: setattr(model.config, "max_length", 7), True),
            (lambda: setattr(model.config, "max_length", 9), True),
            (lambda: model.generation_config.update(max_new_tokens=3), True), (turn, False),
            (lambda: kwargs.update(max_new_tokens=5, logits_processor=[repeat]), True),
            (lambda: setattr(repeat, "penalty", 10.0), True), (turn, False),
        ]
        for change, compiles in changes if kind == GPT2 else changes[2:4]:
            change()
            traces.clear()
            begin(callback, model)
            callback.on_epoch_end(0)
            np.testing.assert_array_equal(received[-1].predictions, generate(**batch, **kwargs))
            assert len(traces) <= 2 and bool(traces) is compiles  # a first try needs autograph
        assert len({pair.predictions.tobytes() for pair in received}) == len(received)

    def test_xla_fills_a_batch_up_to_the_largest_of_its_own_width_and_leaves_out_empty_ones(self):
        model, shapes = tiny(GPT2), []
        model.generate = lambda input_ids: shapes.append(tuple(input_ids.shape)) or input_ids
        sizes = [(0, 4), (3, 4), (2, 9), (0, 9), (1, 9), (4, 4), (2, 4)]
        batches = [{"input_ids": RNG.integers(1, 40, size).astype("int32")} for size in sizes]
        received = generated(model, as_pipeline(batches), use_xla_generation=True, label_cols=[])[0]
        assert_equal(received, padded([row for x in batches for row in x["input_ids"]], 0))
        assert shapes == [(3, 4), (2, 9), (4, 4)]

    STOPS = {"eos_token_id": [36, 21]}  # the first text ends with 21, the others of its batch later

    @each("is_given", [False, True], ids=["settings of the model", "settings given"])
    @each("settings, padding", [({}, 21), (STOPS, 36), ({**STOPS, "pad_token_id": 6}, 6)])
    def test_tokens_and_scores_are_padded_with_what_generate_pads_with(
            self, is_given, settings, padding):
        model = tiny(GPT2, pad_token_id=None, eos_token_id=21)  # as the stock GPT2
        options = dict(max_new_tokens=8, output_scores=True, return_dict_in_generate=True)
        config = model.generation_config
        if is_given:
            config = options["generation_config"] = copy.deepcopy(config)
        config.update(**settings)
        batches = list(map(without_labels, batches_for(GPT2)[:2]))
        outputs = [model.generate(**batch, **options) for batch in batches]
        received = generated(model, as_pipeline(batches), label_cols=[], generate_kwargs=options)[0]
        rows = [row for output in outputs for row in output.sequences.numpy()]
        np.testing.assert_array_equal(received["sequences"], padded(rows, padding))
        scores = [row for output in outputs for row in np.stack(output.scores, 1)]
        np.testing.assert_array_equal(np.stack(received["scores"], 1), padded(scores))
        assert rows[0][-1] == padding  # generate itself has padded with it

    def test_inputs_in_a_tuple_that_generate_cannot_take_are_named_before_the_first_epoch(self):
        ids, options = np.ones((2, 3), "int32"), dict(predict_with_generate=True, batch_size=2)
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot generate.*Error: .*, 3\)"):
            begin(measuring([], ((ids, ids), Y[:2]), generate_kwargs=ENDS, **options), tiny(GPT2))
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
def make(make=tests.small_model, **methods):
    with strategy.scope():
        return make(keras, **methods)
data = tests.in_batches(tests.X[:16], tests.Y[:16])
tests.assert_resumes(make, folder, lambda model, **options: model.fit(data, verbose=0, **options))
call = lambda self, x: x * tf.distribute.get_strategy().num_replicas_in_sync
received = tests.evaluate(make(tests.own_model, call=call), data)
tests.assert_equal(received.predictions, tests.X[:16] * 2)
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
        cluster, codes = {"worker": free_addresses(2)}, []
        folders = tmp_path / "0", tmp_path / "1"
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
        assert set(os.listdir(folders[0] / "out")) == {"README.md", "checkpoint", "model.keras"}
        assert len(hub.commits("user/workers")) == asked("commit")
        assert load_repo_checkpoint(loaded, "user/workers", token=WRITE) == {"epoch": 2}

class TestJax:
    __test__ = BACKEND == "jax"

    @each("processes", [1, 2])
    def test_two_devices_measure_what_one_predicts_and_the_first_process_alone_commits(
            self, keras, tmp_path, processes):
        devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}"}
        addresses = ",".join(free_addresses(processes))
        folders = [tmp_path / str(process) for process in range(processes)]
        given = [[addresses, 2, process] if processes > 1 else [] for process in range(processes)]
        scripts = [ON_JAX.format(processes=p, folder=str(f)) for p, f in zip(given, folders)]
        children(*((script, devices) for script in scripts))
        for folder in folders:
            assert_measured_as_loaded(folder, keras.saving.load_model("hf://user/parallel"))
        assert not [path for folder in folders[1:] for path in (folder / "out").iterdir()]
        assert len(hub.commits("user/parallel")) == asked("commit")

    def test_a_predict_step_of_ones_own_gives_what_it_gives_in_predict(self, keras):
        step = lambda self, state, data: (EvalPair(data[0] * 2, [data[1], {"a": data[0]}]), state)
        assert_as_predict(own_model(keras, predict_step=step), in_batches(X, TARGETS))

@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
class TestKerasHub:
    __test__ = has("keras_hub")

    TEXTS = ["ab cd", "e", "fgh ab a", "j", "ab ab", "cab fad", "hid"]
    WORDS = ["<s>", "<pad>", "</s>", "<|endoftext|>", "<unk>", "<mask>", *"Ġabcdefghij", "ab"]
    SIZES = dict(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, dropout=0.0)
    ENDS, SHORT = TEXTS[::-1], {"max_length": 9}

    def task(self, kind, sides=("",), scale=0.5, **head):
        """A small GPT2 or BART of random weights that generates greedily, or a classifier."""
        import keras_hub
        cls, sampler = getattr(keras_hub.models, kind), {} if head else {"sampler": "greedy"}
        words = {"vocabulary": {word: n for n, word in enumerate(self.WORDS)}, "merges": ["a b"]}
        lengths = {f"{side}sequence_length": 12 for side in sides}
        sizes = dict(vocabulary_size=len(self.WORDS), max_sequence_length=16, **self.SIZES)
        preprocessor = cls.preprocessor_cls(cls.preprocessor_cls.tokenizer_cls(**words), **lengths)
        model = cls(cls.backbone_cls(**sizes), preprocessor=preprocessor, **head)
        rng = np.random.default_rng(11)
        model.set_weights([rng.normal(size=w.shape, scale=scale) for w in model.get_weights()])
        loss = FIRST.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, weighted_metrics=[], jit_compile=False, **sampler)
        return model

    def test_a_language_model_gives_the_text_of_one_example_at_a_time_and_loads_as_pushed(
            self, tmp_path):
        model, push = self.task("GPT2CausalLM"), pushing(tmp_path)
        data = in_batches(self.TEXTS, self.TEXTS, size=3)
        received = generated(model, data, generate_kwargs=self.SHORT)
        expected = [model.generate(text, **self.SHORT) for text in self.TEXTS]
        assert len(set(expected)) > 3
        assert [column.tolist() for column in received] == [expected, self.TEXTS]
        begin(push, model)
        push.on_train_end()
        loaded = loaded_by_card(push)["model"]
        loaded.compile(sampler="greedy", jit_compile=False)
        assert loaded.generate(self.TEXTS, **self.SHORT) == expected

    def test_an_encoder_decoder_generates_without_its_labels_and_predicts_from_both_texts(self):
        model = self.task("BartSeq2SeqLM", ["encoder_", "decoder_"], 2.0)  # so that texts differ
        data = in_batches(both := {"encoder_text": self.TEXTS, "decoder_text": self.ENDS}, size=3)
        received = generated(model, data, generate_kwargs=self.SHORT, label_cols="decoder_text")
        expected = [model.generate(text, **self.SHORT) for text in self.TEXTS]
        assert [column.tolist() for column in received] == [expected, self.ENDS]
        logits, _ = evaluate(model, data, label_cols="decoder_text")
        expected = model(model.preprocessor(both)[0])
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    def test_a_classifier_is_measured_pushed_and_loads_with_its_preprocessor(self, tmp_path):
        model, push = self.task("RobertaTextClassifier", num_classes=3), pushing(tmp_path)
        received, data = [], in_batches(self.TEXTS, Y[:7], size=3)
        model.fit(data, verbose=0, callbacks=[measuring(received, data), push])
        expected = model.predict(texts := np.array(self.TEXTS), verbose=0)
        assert_equal(loaded_by_card(push)["model"].predict(texts, verbose=0), expected)
        assert_close(received[0], EvalPair(expected, Y[:7]))

class TestLegacySwitch:  # the same module where tf.keras is tf_keras
    __test__ = has("tf_keras") and "TF_USE_LEGACY_KERAS" not in os.environ

    def test_metrics_logs_and_pushes_work_with_it(self):
        tests = "TestLogs or test_each_epoch or test_steps_are"
        command = [sys.executable, "-m", "pytest", "-q", "-k", tests, __file__]
        options = dict(cwd=HERE, env={**os.environ, "TF_USE_LEGACY_KERAS": "1"}, text=True)
        run = subprocess.run(command, capture_output=True, **options)
        assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]

# Packaging and README ------------------------------------------------------------------------
README, TOX = ((HERE / name).read_text("utf-8") for name in ("README.md", "tox.ini"))
def run_readme_block(text, folder, **names):
    """Runs the README's block that holds a text as it stands, logged in; returns its names."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in b)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", WRITE)
        exec(block, names)
    return names

class TestPackaging:
    @each("function, names", [
        (KerasMetricCallback, "metric_fn eval_dataset output_cols label_cols batch_size "
         "predict_with_generate use_xla_generation generate_kwargs"),
        (PushToHubCallback, "output_dir save_strategy save_steps tokenizer hub_model_id hub_token "
         "checkpoint model_card_args"),
        (load_repo_checkpoint, "model repo_path_or_name token"),
    ])
    def test_the_signatures_are_the_documented_ones(self, function, names):
        assert list(inspect.signature(function).parameters) == names.split()
        assert {*names.split()} <= {*re.findall(r"(?m)^ +\**(\w+): ", function.__doc__)}

    def test_the_readme_names_the_environments_and_the_versions_of_tox(self):
        environments = re.search("env_list = lint, (.*)", TOX)[1].split(", ")
        assert {*environments} <= {*re.findall(r"`(\w+)`", README)}
        table = README.partition("## What works with what")[2]
        assert {*re.findall(r" (\d+\.\d+)", table)} <= {*re.findall(r"(?:>=|python)([\d.]+)", TOX)}

class TestReadmeCommands:
    def test_the_commands_are_those_of_the_client_here_and_of_tox(self):
        tools = pathlib.Path(sys.executable).parent
        commands = map(str.split, re.findall(r"`((?:hf|huggingface-cli) [\w -]+)`", README))
        here = [(tools / name, *words) for name, *words in commands if (tools / name).exists()]
        assert {subprocess.run([*c, "--help"], capture_output=True).returncode for c in here} == {0}
        assert all(f"[testenv:{e}]" in TOX for e in re.findall(r"tox -e (\w+)", README))

    def test_a_private_repository_made_as_told_is_pushed_to(self, model, tmp_path, monkeypatch):
        sent, route = [], hub.route
        monkeypatch.setattr(hub, "route", lambda *a: sent.append(a[1]) or route(*a))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        exec(re.search(r"`(huggingface_hub\.create_repo\(.*?\))`", README)[1])
        assert re.search('"private": ?true|"visibility": ?"private"', str(sent[-1]))
        fit_in_order(model, callbacks=[pushing(tmp_path, "digits")])
        assert list(hub.repos) == ["user/digits"] and hub.commits("user/digits")

class TestReadme:
    __test__ = bool(KERAS3)  # the quickstart is about Keras 3

    def test_the_quickstart_loads_back_a_model_with_the_same_f1(self, tmp_path, capsys):
        FIRST.utils.set_random_seed(1)  # F1 differs by 0.04 among seeds
        names = run_readme_block("load_digits", tmp_path)
        last = float(re.search(r"F1 of the model loaded back: (.*)", capsys.readouterr().out)[1])
        assert names["history"].history["f1_macro"][-1] == pytest.approx(last) and last > 0.9

    def test_the_block_about_resuming_runs(self, keras, tmp_path):
        given = dict(model=small_model(keras), train_dataset=in_batches(X, Y))
        assert run_readme_block("./resumable", tmp_path, **given)["last"] == {"epoch": 1}

if __name__ == "__main__":  # runs the quickstart and shows what lies on the stand-in afterwards
    run_readme_block("load_digits", HOME.name, __name__="__main__")
    print("On the Hub:", *hub.commits("user/digits"), *on_hub("digits"), sep="\n")
