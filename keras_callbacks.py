# Copyright (c) 2026 The keras_callbacks authors
# SPDX-License-Identifier: MIT
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software
# and associated documentation files (the "Software"), to deal in the Software without
# restriction, including without limitation the rights to use, copy, modify, merge, publish,
# distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
# Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
# BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
# OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""Two callbacks for Keras' `fit`: metrics in plain Python, and pushing to the Hugging Face Hub.

`KerasMetricCallback` predicts (or generates) a whole evaluation set at the end of each epoch and
hands it to a function of yours. `PushToHubCallback` saves the model while it trains and commits it
to a repository on the Hub. Their interface is the one that transformers 4.34 documents under "Keras
callbacks"; any Keras model will do: Keras 3 on each backend, tf_keras, KerasHub, transformers.

To vendor it, copy this one file into your project. It needs Python 3.10, tensorflow 2.15, numpy and
huggingface_hub 0.25 or newer (and h5py and tqdm, which these bring along).
MIT licence, above.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import difflib
import enum
import errno
import functools
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import huggingface_hub.utils
import numpy as np
import tensorflow as tf
from tqdm import tqdm

__version__ = "4.0.0"
__all__ = ["IntervalStrategy", "KerasMetricCallback", "PushToHubCallback", "load_repo_checkpoint"]

logger = logging.getLogger(__name__)
hub_utils: Any = huggingface_hub.utils
Array = np.ndarray[Any, Any]
Row = dict[str, "int | float"]  # the logs of one epoch

PADDING = -100  # what collators pad labels with, and what losses ignore
FIRST_WAIT = 1.0  # seconds before the second attempt; doubles with each further one
LONGEST_WAIT = 30.0  # seconds between two attempts, unless the Hub asks for more
CREATION_SECONDS = 10.0  # how long requests are retried after their first failure
BACKGROUND_SECONDS = 60.0  # the same for those of a push while training goes on
FINAL_SECONDS = 300.0  # the same for those of the final push
SLOWEST_LINK = 100_000  # bytes per second: the slowest upload that the final wait allows for
MISSING = (hub_utils.EntryNotFoundError, hub_utils.RepositoryNotFoundError)
CARD = "README.md"
CHECKPOINT = "checkpoint/state.weights.h5"
STATE, LEFT_OUT = "keras_callbacks/state", "keras_callbacks/variables"  # in it, added by us
RESCUED = "rescued.weights.h5"  # of a model that could not be saved
PRIVATE = ".keras_callbacks-"  # prefix of the hidden folders where saves are written and copied
NEVER_PUSHED = [  # hidden files and files that may hold a secret, at any depth of output_dir
    # k becomes [kK], since patterns of huggingface_hub distinguish cases.
    before + re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", name) + after
    for name in f"""
        .* *.env *.pem *.key *.p12 *.pfx *.ppk id_rsa* id_dsa* id_ecdsa* id_ed25519* credentials*
        client_secret* secret.* secrets.* service?account* password* *api?key* kaggle.json token
        token.txt *_token.txt stored_tokens _netrc {RESCUED}
    """.split()
    for before, after in itertools.product(("", "*/"), ("", "/*"))
]
SAVERS = ("save_pretrained", "save_to_preset")  # of transformers and of KerasHub
CARD_ARGS = "dataset dataset_args dataset_tags finetuned_from language license tags tasks".split()


class IntervalStrategy(str, enum.Enum):
    """When PushToHubCallback saves; any case, and any enum with these values, is accepted."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


# What a `metric_fn` with a single required parameter receives.
EvalPrediction = collections.namedtuple("EvalPrediction", ["predictions", "label_ids"])


class _AnyKerasCallback(tf.keras.callbacks.Callback):  # type: ignore[misc]
    """A callback for the `fit` of Keras 3 and of tf_keras, whichever of them `tf.keras` is."""

    # tf_keras calls these three methods of each callback; the Callback of Keras 3 lacks them.
    def _implements_train_batch_hooks(self) -> bool:
        return getattr(self, "save_strategy", None) == IntervalStrategy.STEPS

    _implements_test_batch_hooks = _implements_predict_batch_hooks = lambda self: False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies the callback alone: neither tf.data pipelines nor uploads can be copied."""
        return copy.copy(self)


class KerasMetricCallback(_AnyKerasCallback):
    """Computes metrics in plain Python at the end of every epoch and adds them to the epoch's logs.

    Unlike Keras' own metrics, `metric_fn` sees the whole evaluation set at once, as NumPy arrays,
    and may use any library, as for ROUGE or macro-F1. History, the progress bar and the callbacks
    listed after this one see the results. When training begins, the first batch is evaluated once
    without `metric_fn`: what model, data and arguments cannot do together is refused at once.

    ```python
    def macro_f1(predictions, labels):  # (examples, classes) float32, (examples,) int64
        return {"f1_macro": f1_score(labels, predictions.argmax(-1), average="macro")}

    model.fit(train_dataset, callbacks=[KerasMetricCallback(macro_f1, eval_dataset)])
    ```

    Predictions are what Keras' `predict` gives. A `predict` or `make_predict_function` of the
    model's own is called batch by batch, as `predict(dataset_of_one_batch, verbose=0)`: leave to
    `metric_fn` what has to see the whole set.

    Args:
        metric_fn: Called as `metric_fn(predictions, labels)`. A function with exactly one required
            positional parameter gets one named tuple `(predictions, label_ids)` instead, unless a
            second parameter is called `labels`. Both hold fresh, writable arrays of shape
            (examples, ...), in the nesting that the model or the data set has, but bare where a
            dict has one column; labels are None where the data have none. Batches of different
            widths are padded at the end: numbers with -100, generated integers with the pad token
            (else the end token), columns whose name ends in "mask" with 0, text with the empty
            string. Half precision is float32, text `str` (`bytes` where it is not UTF-8). Returns a
            dict of metric names to numbers; an array or list of one axis becomes a number for each
            entry, "name_0", ....
        eval_dataset: A batched `tf.data.Dataset`, or, together with `batch_size`, a dict, a tuple,
            an array or a tensor. Its elements are `inputs`, `(inputs, labels)` or `(inputs, labels,
            sample_weight)`. It has to end, and is read once per epoch; of unknown size, it stays
            open through the first one, so that `cache(filename)` of it serves this callback alone.
        output_cols: Names of the model's outputs to keep, when it returns a dict. Defaults to all
            but "loss" and what the model's configuration ignores at inference. Has no effect
            where `generate` returns nothing but tokens.
        label_cols: Names of columns of the labels or of the inputs to use as labels; an empty list
            for none. Defaults to the labels of a tuple; of a dict, to the column "labels", else to
            "start_positions" and "end_positions". Generation does not see the columns of the inputs
            that are named here, "labels", nor "decoder_..." of transformers: where the inputs hold
            the answer, name it, as `label_cols="input_ids"` for BLIP's captions.
        batch_size: Examples per batch, for data that are not a `tf.data.Dataset`; else ignored.
        predict_with_generate: Whether predictions come from `model.generate`. Defaults to False.
        use_xla_generation: Whether to compile the `generate` of transformers with XLA, for each
            width of the inputs, and anew for a larger batch than before. Defaults to False.
        generate_kwargs: Keyword arguments for every call of `model.generate`. Defaults to none.
            Changes to them, or to the model's settings, count from the next `fit` on.

    Raises:
        TypeError: `metric_fn` or `eval_dataset` has a type that cannot be used; in `fit`,
            `metric_fn` did not return a dict of names to numbers.
        ValueError: `eval_dataset` is infinite, empty or unbatched, or lacks `batch_size` or a
            column; when training begins, the model cannot do what is asked of it.
    """

    def __init__(
        self,
        metric_fn: Callable[..., Mapping[str, Any]],
        eval_dataset: Any,
        output_cols: list[str] | None = None,
        label_cols: list[str] | None = None,
        batch_size: int | None = None,
        predict_with_generate: bool = False,
        use_xla_generation: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.params: dict[str, Any] = {}  # what `fit` is given; Keras sets it
        self.metric_fn, self._takes_pair = metric_fn, _takes_pair(metric_fn)
        self.eval_dataset, self.batch_size = _as_dataset(eval_dataset, batch_size), batch_size
        self.output_cols = [output_cols] if isinstance(output_cols, str) else output_cols
        self.label_cols = _find_label_columns(self.eval_dataset.element_spec, label_cols)
        self.predict_with_generate = predict_with_generate
        self.use_xla_generation = use_xla_generation
        self.generate_kwargs = dict(generate_kwargs or {})
        self._prepared_for: list[Any] = []  # the settings that `_run` was made for
        self._run: Callable[[Any], Any] = lambda element: None  # gives the outputs for an element
        self._opened: Iterator[Any] | None = None  # by the rehearsal for the first epoch

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Rehearses an epoch's end with the first batch, which the first epoch evaluates again."""
        model = self.model
        try:
            elements = filter(_has_examples, self.eval_dataset)
            read = list(itertools.islice(elements, 1))
            if read and self._settings() != self._prepared_for:
                self._prepared_for = []  # until this has succeeded
                generates, kwargs = self.predict_with_generate, self.generate_kwargs
                given = model, read[0], self.label_cols, kwargs, self.use_xla_generation
                self._run = _generator(*given) if generates else _predictor(model, read[0])
            self._evaluate(read)
        except Exception as error:
            what = "generate from" if self.predict_with_generate else "predict"
            raise ValueError(
                f"{type(model).__name__} cannot {what} the first batch of eval_dataset: "
                f"{type(error).__name__}: {error} (inputs in a tuple go by the order of the "
                f"parameters of `call`, in a dict by name: {self.eval_dataset.element_spec})"
            ) from error
        self._prepared_for = self._settings()  # which the `generate` of Whisper changes itself
        # Data of unknown size may be such that can be read only once. Others are read anew: an
        # open iterator would lock a cache in a file, which `validation_data` may read as well.
        is_known = int(self.eval_dataset.cardinality()) >= 0
        self._opened = None if is_known else itertools.chain(read, elements)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Evaluates the whole set in one pass and adds what `metric_fn` returns to `logs`."""
        if self._prepared_for[:1] != [self.model]:  # outside of `fit`
            self.on_train_begin()
        elements, self._opened = self._opened or filter(_has_examples, self.eval_dataset), None
        total = max(int(self.eval_dataset.cardinality()), 0) or None  # negative if not known
        # tqdm: None hides the bar off a terminal. "auto" is the default of `fit`.
        hidden = None if self.params.get("verbose") in (1, "auto") else True
        with tqdm(elements, "Evaluating", total, leave=False, disable=hidden, delay=2) as counted:
            pair = self._evaluate(counted)
        result = self.metric_fn(pair) if self._takes_pair else self.metric_fn(*pair)
        metrics = _numbers_in(result, is_strict=True)
        if logs is not None:
            logs.update(metrics)

    def _settings(self) -> list[Any]:
        """Returns what the way to predict or generate depends on, to see whether it changed."""
        model = self.model
        model.make_predict_function()  # a new one after `compile`
        configs = [getattr(model, name, None) for name in ("config", "generation_config")]
        pickled = os.urandom(16)  # what cannot be compared counts as changed
        with contextlib.suppress(Exception):
            # Sees changes in objects such as logits processors too; never unpickled.
            pickled = pickle.dumps([self.generate_kwargs, *configs])
        return [model, model.predict_function, pickled]

    def _evaluate(self, elements: Iterable[Any]) -> EvalPrediction:
        """Returns predictions and labels of all elements; memory holds these and one batch."""
        predictions: list[Any] = []
        labels: list[Any] = []
        generates = self.predict_with_generate
        token = _pad_token(self.model, self.generate_kwargs) if generates else PADDING
        # Random generators of Keras 3 and recurrent layers go on from where training has left them.
        parts, names = _parts_of(self.model).values(), ("state", "states")
        states = tf.nest.flatten([getattr(part, n, None) for *_, part in parts for n in names])
        values = [(state, np.asarray(state)) for state in states if hasattr(state, "assign")]
        try:
            for element in elements:
                labels.append(_to_numpy(_labels_of(element, self.label_cols)))
                outputs = self._run(element)
                if isinstance(outputs, Mapping) or not generates:
                    outputs = _select_outputs(self.model, outputs, self.output_cols)
                predictions.append(_to_numpy(outputs, token, generates))
        finally:
            for state, value in values:
                state.assign(value)
        if not predictions:
            raise ValueError(
                "eval_dataset must give at least one batch, but it gave none. If it gave some "
                "before, it can be read only once: open its source anew in the function given to "
                "from_generator, or cache() it."
            )
        pair = _concatenate(predictions, token), _concatenate(labels)
        bare = ([*x.values()][0] if isinstance(x, dict) and len(x) == 1 else x for x in pair)
        return EvalPrediction(*bare)


class PushToHubCallback(_AnyKerasCallback):
    """Saves the model while it trains and pushes each save to the Hugging Face Hub.

    Uploads run in the background, and training goes on; saves made during an upload stay local, and
    the next save after it is pushed. When training ends the final state is pushed and awaited.
    Whatever the Hub does, `fit` goes on, and `output_dir` holds the newest save, each file whole.
    While training goes on, a push that would leave no space for the next save is left out.
    List it after callbacks whose metrics the card is to have, and whose weights it is to save.

    ```python
    push_to_hub = PushToHubCallback("./digits", hub_model_id="user/digits", license="mit")
    model.fit(train_dataset, callbacks=[push_to_hub])
    ```

    Args:
        output_dir: The folder that holds the newest save and is kept in sync with the repository.
            It may exist and hold other files; they are pushed too (of links to files what they
            point to), except hidden ones and those named like secrets (`NEVER_PUSHED`). A save
            replaces files that are named as its own.
        save_strategy: "epoch" saves at the end of each epoch, "steps" every `save_steps` batches,
            "no" only when training ends, which the other two do as well. Defaults to "epoch".
        save_steps: Batches between saves, counted over the whole `fit`. Needed for "steps".
        tokenizer: A tokenizer or processor to save beside the model. Defaults to none.
        hub_model_id: The repository, "name" or "owner/name". Defaults to the name of `output_dir`.
            Created if missing, public unless the account or the organization sets otherwise.
        hub_token: The token to push with. Defaults to the one that `hf auth login` stored.
        checkpoint: Whether the end of each epoch also saves what `load_repo_checkpoint` needs to
            resume: weights, state of the optimizers, epoch. Only with "epoch". Defaults to False.
        **model_card_args: Facts for the model card: `language`, `license`, `tags`,
            `finetuned_from`, `tasks`, `dataset`, `dataset_tags`, `dataset_args`.

    Attributes:
        training_history: The logs of each epoch of this `fit`, a list of dicts.
        last_job: The `concurrent.futures.Future` of the newest upload, or None before the first.
        hub_model_id: The full name of the repository, "owner/name".

    Raises:
        TypeError: An argument is unknown or has a type that cannot be used.
        ValueError: `save_strategy`, `save_steps` and `checkpoint` do not fit together.
        OSError: `output_dir` is a file (NotADirectoryError), or cannot be written.
        huggingface_hub.utils.HfHubHTTPError: The Hub refuses the token or the repository.
        ConnectionError: The Hub cannot be reached.
        RuntimeError: Model or tokenizer cannot be saved (raised when training begins if that can
            be known then), or a save could not be written during `fit`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        save_strategy: str | IntervalStrategy = "epoch",
        save_steps: int | None = None,
        tokenizer: Any = None,
        hub_model_id: str | None = None,
        hub_token: str | None = None,
        checkpoint: bool = False,
        **model_card_args: Any,
    ) -> None:
        super().__init__()
        self.params: dict[str, Any] = {}  # what `fit` is given; Keras sets it
        strategy = str(getattr(save_strategy, "value", save_strategy)).lower()
        choices = [each.value for each in IntervalStrategy]
        if strategy not in choices:
            raise ValueError(f"save_strategy must be one of {choices}, but received {strategy!r}.")
        is_count = isinstance(save_steps, (int, np.integer)) and save_steps > 0
        if strategy == "steps" and not is_count:
            raise ValueError(
                'save_steps must be a positive integer when save_strategy is "steps", '
                f"but received {save_steps=}."
            )
        if checkpoint and strategy != "epoch":
            raise ValueError(f'checkpoint needs save_strategy="epoch", but received {strategy!r}.')
        if tokenizer is not None and not any(hasattr(tokenizer, name) for name in SAVERS):
            name = type(tokenizer).__name__
            raise TypeError(f"tokenizer must have one of the methods {SAVERS}, but is a {name}.")
        if unknown := sorted(model_card_args.keys() - set(CARD_ARGS)):
            raise TypeError(f"model_card_args must be among {CARD_ARGS}, but received {unknown}.")
        self.output_dir = Path(os.path.abspath(os.path.expanduser(output_dir)))
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise NotADirectoryError(f"output_dir must be a folder, not a file: {self.output_dir}")
        self.save_strategy, self.save_steps = IntervalStrategy(strategy), save_steps
        self.tokenizer, self.checkpoint = tokenizer, checkpoint
        self.model_card_args = model_card_args
        # A token that was read from a file may end in a line break.
        api = self._api = huggingface_hub.HfApi(token=(hub_token or "").strip() or None)
        name = hub_model_id or self.output_dir.resolve().name
        opened = _attempt(api, lambda: _open_repo(api, name, self.output_dir), CREATION_SECONDS)
        self.hub_model_id, self._known_files, self._card_metadata = opened
        self._url = f"{api.endpoint}/{self.hub_model_id}"
        self.training_history: list[Row] = []
        self.last_job: concurrent.futures.Future[Any] | None = None
        self._epochs: dict[Any, int] = {}  # first one that ended with these weights, by fingerprint
        self._steps = 0  # batches trained in this `fit`
        self._first_update: int | None = None  # of the optimizer in this `fit`, if it counts steps

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts history and counts anew, and refuses what could not be saved."""
        model, kind = self.model, _kind_of(self.model)
        self.training_history, self._epochs = [], {}
        counts = getattr(model, "steps_per_execution", 1) != 1 and model.optimizer is not None
        self._steps, self._first_update = 0, _count_updates(model) if counts else None
        parts = [self.tokenizer]
        try:
            if kind.library == "transformers" and model.can_generate():
                parts.append(model.generation_config)  # refuses a temperature without sampling, say
            elif kind.library in ("keras", "tf-keras"):
                try:
                    json.dumps(kind.keras.saving.serialize_keras_object(model))
                except Exception as error:  # a layer may not know its config before it is built
                    if model.built or isinstance(error, NotImplementedError):
                        raise
            with tempfile.TemporaryDirectory() as folder:
                for part, name in itertools.product(parts, SAVERS):
                    if hasattr(part, name):
                        getattr(part, name)(folder)
        except Exception as error:
            raise RuntimeError(
                f"{type(model).__name__} or its tokenizer could not be saved after training: "
                f"{type(error).__name__}: {error} (often a get_config is missing)"
            ) from error

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Forgets what an earlier `fit` recorded of this and later epochs."""
        rows = _history.get(self.model, {})
        _history[self.model] = {n: rows[n] for n in rows if n < epoch}

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves after every `save_steps` batches."""
        if self.save_strategy != IntervalStrategy.STEPS:
            return
        before, self._steps = self._steps, self._steps + 1
        if self._first_update is not None:
            self._steps = max(self._steps, _count_updates(self.model) - self._first_update)
        if self._steps // self.save_steps > before // self.save_steps:  # type: ignore[operator]
            epoch = self._epochs.get(_fingerprint(self.model))
            self._save_and_push(f"Training in progress, step {self._steps}", epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Records the logs and, with "epoch", saves."""
        row = _numbers_in(logs or {})
        self.training_history.append(row)
        rows = _history.get(self.model, {})
        _history[self.model] = {n: rows[n] for n in rows if n < epoch} | {epoch: row}
        # Another callback may have put back the weights of an earlier epoch, or averaged them: the
        # EarlyStopping of Keras 2.15 does so before the last epoch's end is seen here.
        if weights := _fingerprint(self.model):
            self._epochs.setdefault(weights, epoch)
        if self.save_strategy == IntervalStrategy.EPOCH:
            message = f"Training in progress, epoch {epoch}"
            self._save_and_push(message, self._epochs.get(weights), self.checkpoint)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Saves the final state, pushes it and waits until it is on the Hub."""
        epoch = self._epochs.get(_fingerprint(self.model))
        if upload := self._save_and_push("End of training", epoch, is_final=True):
            self._wait_for(upload)

    def _save_and_push(
        self, message: str, epoch: int | None, has_checkpoint: bool = False, is_final: bool = False
    ) -> _Upload | None:
        """Writes a save, puts it into `output_dir` and returns its upload, unless another one runs.

        Every process of a distributed training writes, since saving and reading metrics can be
        collective; the chief alone publishes and pushes. `epoch` is the one that ended with these
        weights, None if there is none.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
        with contextlib.ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix=PRIVATE, dir=self.output_dir))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                self._write_save(folder, epoch, has_checkpoint)
                if not _kind_of(self.model).is_chief:
                    return None
                names = _publish(folder, self.output_dir, self._known_files)
            except Exception as error:
                rescued = ""
                with contextlib.suppress(Exception):
                    _check_free_space(self.model, folder, has_checkpoint=True)
                    _write_checkpoint(self.model, {}, folder / RESCUED)
                    os.replace(folder / RESCUED, file := self.output_dir / RESCUED)
                    rescued = f" The weights are in {file}, for model.load_weights."
                raise RuntimeError(
                    f"Could not write a save to {self.output_dir}: {type(error).__name__}: {error}."
                    f" Every file there is still whole.{rescued}"
                ) from error
            running = _uploads.get(self.hub_model_id)
            if running is not None and not running.future.done() and not is_final:
                return None  # this save stays local, the next one is pushed
            upload = _Upload(
                self._api, self.hub_model_id, self.output_dir, folder, names, message, is_final,
                size=sum((folder / name).stat().st_size for name in names),
            )
            upload.future.set_running_or_notify_cancel()  # so that nobody can cancel it
            try:
                shows_bars = is_final and bool(self.params.get("verbose"))
                threading.Thread(target=upload.run, args=(running, shows_bars), daemon=True).start()
                stack.pop_all()  # from here on the upload removes the folder
                _uploads[self.hub_model_id] = upload
            except RuntimeError as error:  # there can be no more threads
                upload.fail(error)
            self.last_job = upload.future
        return upload

    def _wait_for(self, upload: _Upload) -> None:
        """Waits for the final push, as long as a slow link may take, and says how it ended."""
        future, say = upload.future, print if self.params.get("verbose") else logger.debug
        say(f"Pushing the final state to {self._url}")
        try:
            concurrent.futures.wait([future], FINAL_SECONDS)
            concurrent.futures.wait([future], upload.size / SLOWEST_LINK)
        finally:  # after Ctrl-C too
            upload.stop.set()
            if error := future.exception() if future.done() else TimeoutError("the wait has ended"):
                logger.error(
                    "The final state could not be pushed to %s: %s. It is complete in %s; push it "
                    "with:\nhuggingface_hub.HfApi().upload_folder(repo_id=%r, folder_path=%r, "
                    "ignore_patterns=%s.NEVER_PUSHED)",
                    self._url, _diagnose(error)[0], self.output_dir, self.hub_model_id,
                    str(self.output_dir), __name__,
                )
            else:
                say(f"Pushed: {future.result().commit_url}")

    def _write_save(self, folder: Path, epoch: int | None, has_checkpoint: bool) -> None:
        """Writes all files of a save into a folder: model, tokenizer, checkpoint and card."""
        model, kind, tokenizer = self.model, _kind_of(self.model), self.tokenizer
        rows = _history.get(model, {})
        _check_free_space(model, folder, has_checkpoint)
        if kind.library == "keras":  # what load_model("hf://owner/name") reads
            kind.keras.saving.save_model(model, str(folder), zipped=False)
        elif kind.library == "tf-keras":  # which defaults to HDF5 in all threads but the main one
            model.save(str(folder / "model.keras"), save_format="keras_v3")
        for part, name in itertools.product((model, tokenizer), SAVERS):
            if hasattr(part, name):
                getattr(part, name)(str(folder))
        if has_checkpoint:
            (folder / CHECKPOINT).parent.mkdir(exist_ok=True)
            _write_checkpoint(model, rows, folder / CHECKPOINT)
        facts = {key: self.params.get(key) for key in ("epochs", "steps")} | self.model_card_args
        facts |= {"repo_id": self.hub_model_id, "tokenizer": tokenizer}
        try:  # a failure here does not stop the weights
            kept = _kept_metadata(self.output_dir / CARD)
            if kept is not None:
                card = _model_card(model, facts, kept | self._card_metadata, rows, epoch)
                (folder / CARD).write_text(card, "utf-8", errors="replace")
        except Exception as error:
            logger.warning("No model card was written: %s: %s", type(error).__name__, error)


def load_repo_checkpoint(
    model: Any, repo_path_or_name: str | Path, token: str | None = None
) -> dict[str, Any]:
    """Restores weights and optimizers that PushToHubCallback saved with `checkpoint=True`.

    The model must have its weights, and be compiled with the optimizer it was trained with. Nothing
    executable is loaded, and nothing is assigned unless the whole checkpoint fits. The file is one
    of Keras' own: `model.load_weights` reads it too, apart from what this module adds to it.

    ```python
    last = load_repo_checkpoint(model, "user/digits")
    model.fit(train_dataset, initial_epoch=last["epoch"] + 1, epochs=20, callbacks=[push_to_hub])
    ```

    Args:
        model: The Keras model to restore.
        repo_path_or_name: A folder with a checkpoint, such as `output_dir`, or "owner/name" of a
            repository on the Hub, whose newest revision is taken.
        token: The token to read the repository with. Defaults to the stored one.

    Returns:
        `{"epoch": N}`, the epoch that was finished last, counted from 0.

    Raises:
        FileNotFoundError: There is no such folder or repository, or no checkpoint in it.
        ValueError: The checkpoint is damaged, or belongs to another model or optimizer.
        OSError: The download cannot be stored.
        huggingface_hub.utils.HfHubHTTPError: The Hub refuses.
        ConnectionError: The Hub cannot be reached.
    """
    file, name = Path(repo_path_or_name).expanduser() / CHECKPOINT, str(repo_path_or_name)
    if not os.access(file, os.R_OK):
        api = huggingface_hub.HfApi(token=(token or "").strip() or None)
        try:
            newest = _attempt(api, lambda: api.model_info(name).sha, CREATION_SECONDS)
            download = functools.partial(api.hf_hub_download, name, CHECKPOINT, revision=newest)
            file = Path(_attempt(api, download, CREATION_SECONDS))
        except hub_utils.LocalEntryNotFoundError as error:  # a download that failed
            raise ConnectionError(f"{name} cannot be read: {_diagnose(error)[0]}") from error
        except (hub_utils.HFValidationError, *MISSING) as error:
            raise FileNotFoundError(
                f"Found no readable {CHECKPOINT}, which an epoch with checkpoint=True writes, in a "
                f"folder or repository {name}: {error}"
            ) from error
    try:
        with h5py.File(file) as opened:
            state = json.loads(opened[STATE][()])
            is_whole = state["arrays"] == _arrays_in(opened)
        there = [*map(str, state["variables"])]
        rows = {int(epoch): _numbers_in(row) for epoch, row in state["history"].items()}
        if not is_whole or min(rows) < 0:
            raise ValueError("its arrays or epochs are not those that were written")
    except Exception as error:
        what = f"{file} is not a checkpoint that checkpoint=True has written"
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
    here = _variables_of(model)
    optimizer: Any = getattr(model, "optimizer", None)
    unlike = {*there} ^ {*here}
    if unlike and hasattr(optimizer, "build") and all(x.startswith("optimizer ") for x in unlike):
        with _kind_of(model).strategy.scope():  # it may have no state yet
            optimizer.build(model.trainable_variables)
        here = _variables_of(model)
    if changes := [*difflib.unified_diff(there, [*here], n=0, lineterm="")]:
        lost, new = ([line for line in changes if line[0] == sign][1:4] for sign in "-+")
        raise ValueError(
            f"The checkpoint does not fit the model: {lost} there, {new} here. Build, freeze and "
            "compile the model as it was when it was saved, its parts in the same order. "
            "Optimizers other than model.optimizer, and those without `build`, are built by one "
            "training step: then load."
        )
    model.built = True  # Keras 3.15 refuses what was never called, such as a GAN
    model.load_weights(str(file))
    with h5py.File(file) as opened:
        for number, (variable, is_left_out) in enumerate(here.values()):
            if is_left_out:
                variable.assign(opened[f"{LEFT_OUT}/{number}"][()])
    # What is traced may hold constants of layers, as Normalization does.
    model.train_function = model.test_function = model.predict_function = None
    _history[model] = rows
    return {"epoch": max(rows)}


# Kept outside the models, whose attributes might be saved with them; resumed training goes on here.
_history: weakref.WeakKeyDictionary[Any, dict[int, Row]] = weakref.WeakKeyDictionary()  # by epoch


# Label columns ------------------------------------------------------------------------------------


def _takes_pair(metric_fn: Any) -> bool:
    """Returns whether `metric_fn` takes one pair rather than predictions and labels."""
    try:
        signature = inspect.signature(metric_fn)
        parameters = signature.parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = [p for p in named if p.default is p.empty]
        is_pair = len(required) == 1 and [p.name for p in named[1:2]] != ["labels"]
        signature.bind(*[None] * (1 if is_pair else 2))
    except ValueError:  # some functions written in C have no signature
        return False
    except TypeError as error:
        raise TypeError(
            "metric_fn must take predictions and labels, or one argument that holds both, "
            f"but received {metric_fn!r}: {error}."
        ) from None
    return is_pair


def _as_dataset(data: Any, batch_size: int | None) -> Any:
    """Returns `data` as a finite, batched tf.data.Dataset."""
    if not isinstance(data, tf.data.Dataset):
        if not isinstance(data, (Mapping, tuple, np.ndarray)) and not tf.is_tensor(data):
            raise TypeError(
                "eval_dataset must be a tf.data.Dataset, a dict, a tuple, an array or a tensor, "
                f"but received {type(data).__name__}."
            )
        if not (isinstance(batch_size, (int, np.integer)) and batch_size > 0):
            raise ValueError(f"batch_size must be a positive integer, but received {batch_size=}.")
        data = tf.data.Dataset.from_tensor_slices(data).batch(batch_size)
    size, spec = int(data.cardinality()), data.element_spec
    if size in (0, tf.data.INFINITE_CARDINALITY):
        what = "endless: remove repeat() or add take()" if size else "empty"
        raise ValueError(f"eval_dataset must be finite, with at least one batch, but it is {what}.")
    if isinstance(spec, tuple) and len(spec) > 3:
        raise ValueError(
            "eval_dataset must give inputs, (inputs, labels) or (inputs, labels, sample_weight), "
            f"but its elements have {len(spec)} parts: {spec}."
        )
    return data


def _split(element: Any) -> tuple[Any, Any]:
    """Returns the inputs and the labels (or None) of an element, or of the `element_spec`."""
    return (*element, None)[:2] if isinstance(element, tuple) else (element, None)


def _find_label_columns(spec: Any, wanted: str | list[str] | None) -> list[str] | None:
    """Returns the names of the label columns; None for labels that have none.

    `spec` is the data set's `element_spec`, `wanted` what the user gave, None to find them.
    """
    inputs, labels = _split(spec)
    columns = {name for part in (inputs, labels) if isinstance(part, Mapping) for name in part}
    names = [wanted] if isinstance(wanted, str) else wanted
    if wanted is None and isinstance(spec, Mapping):
        guesses = [["labels"], ["start_positions", "end_positions"]]
        names = next((guess for guess in guesses if columns >= {*guess}), guesses[0])
        logger.warning("label_cols was not set: %s of eval_dataset serve as labels.", names)
    elif wanted is None and isinstance(labels, Mapping):
        names = list(labels)
    if not columns >= {*(names or [])}:
        raise ValueError(
            "The labels are not found: set label_cols to columns of eval_dataset, which has "
            f"{sorted(columns) or 'no named columns'}, or label_cols=[] for none; tried {names}."
        )
    _labels_of(spec, names)
    return names


def _labels_of(element: Any, label_cols: list[str] | None) -> Any:
    """Returns the labels of an element: columns in a dict, None for none."""
    inputs, labels = _split(element)
    if label_cols is not None:
        parts = [part for part in (inputs, labels) if isinstance(part, Mapping)]
        columns = {name: part[name] for part in parts for name in part}  # labels before inputs
        labels = {name: columns[name] for name in label_cols} or None
    shapes = [leaf.shape for leaf in tf.nest.flatten(labels) if hasattr(leaf, "shape")]
    if 0 in [shape.rank for shape in shapes]:
        raise ValueError("eval_dataset must be batched: its labels are of shape (). Add .batch(n).")
    return labels


def _has_examples(batch: Any) -> bool:
    """Returns whether a batch is not empty, as its first tensor says."""
    first = next(leaf for leaf in tf.nest.flatten(batch) if leaf is not None)
    return bool(first.shape.as_list()[:1] != [0])  # a list: slices of a TensorShape are slow


# Models -------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What a model is, as far as it matters here."""

    keras: Any  # the package of its class: Keras 3, tf_keras, or Keras 2 in TensorFlow 2.15
    backend: str  # "tensorflow", "jax" or "torch"
    library: str  # to save and load it with, as the Hub names it
    strategy: Any  # the tf.distribute.Strategy that it was made under
    is_chief: bool  # whether this process is the one that publishes and pushes


def _kind_of(model: Any) -> _Kind:
    roots = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    keras = sys.modules["tf_keras" if "tf_keras" in roots else "keras"]
    saves_folders = "zipped" in inspect.signature(keras.saving.save_model).parameters
    library = "keras" if saves_folders else "tf-keras"
    if "transformers" in roots:
        library = "transformers"
    elif hasattr(model, "save_to_preset"):
        library = "keras-hub"
    strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
    backend, is_chief = keras.backend.backend(), bool(strategy.extended.should_checkpoint)
    if backend == "jax":
        is_chief = bool(sys.modules["jax"].process_index() == 0)
    return _Kind(keras, backend, library, strategy, is_chief)


def _parts_of(model: Any) -> dict[int, tuple[str, str, Any]]:
    """Returns all that a model, its layers and their lists, tuples and dicts hold, by id.

    Each part is its place, such as "model (Sequential).dense", the class or the given name of the
    layer that holds it, and itself.
    """
    found: dict[int, tuple[str, str, Any]] = {}
    parts = [("model", "", model), ("optimizer", "", getattr(model, "optimizer", None))]
    for place, layer, value in parts:  # which grows meanwhile
        if id(value) in found:
            continue
        found[id(value)] = place, layer, value
        inside: Iterable[tuple[Any, Any]] = ()
        if hasattr(value, "count_params"):  # a layer
            of_class = type(value).__name__
            words = [re.sub(r"[_\d]", "", each).lower() for each in (of_class, value.name)]
            is_automatic = words[0] == words[1]  # such names count on in a process: dense_1
            place, layer = f"{place} ({of_class})", of_class if is_automatic else repr(value.name)
            inside = vars(value).items()
        elif isinstance(value, (Mapping, list, tuple)):
            inside = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in inside:
            if not isinstance(part, (str, int, float)):  # of which lists may be long
                parts.append((f"{place}.{name}", layer, part))
    return found


def _columns_taken(model: Any, inputs: Any) -> list[str]:
    """Returns the names of those input columns that a model takes; none for all, as they are.

    A functional model of Keras 3 matches the sorted columns to its inputs by position, and would
    take a label column of the right shape for an input; models of transformers go by name. All
    others get what they get in `fit`.
    """
    names: list[str] = []
    if not isinstance(inputs, Mapping):
        return names
    if _kind_of(model).library == "transformers":
        parameters = inspect.signature(model.call).parameters.values()
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            names = [parameter.name for parameter in parameters if parameter.name in inputs]
    elif type(model).call.__qualname__ in ("Functional.call", "Sequential.call"):
        symbolic = getattr(model, "input", None)  # a tensor, or a nesting of them
        names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
        names = list(symbolic) if isinstance(symbolic, Mapping) else names
    return names if inputs.keys() >= set(names) else []  # Keras says which are missing


def _predictor(model: Any, first: Any) -> Callable[[Any], Any]:
    """Returns the function from an element, such as the first, to what `predict` would give.

    Where Keras' own `predict` would only call `predict_step`, so does this: a data set of each
    batch, for `predict`, costs 6 to 9 times what the step does (Keras 3.15, tf_keras 2.21).
    """
    kind, (inputs, _) = _kind_of(model), _split(first)
    of_libraries = r"(tf_)?keras\.|keras_hub\..* predict$"
    methods = ("predict", "predict_step", "make_predict_function")
    own = {n for n in methods if not re.match(of_libraries, f"{getattr(model, n).__module__} {n}")}
    columns = _columns_taken(model, inputs)
    lacks_labels, names = False, list(inspect.signature(model.call).parameters)
    if kind.library == "transformers" and model.can_generate():  # makes decoder inputs from labels
        given = inputs if isinstance(inputs, Mapping) else names[: len(tf.nest.flatten(inputs))]
        lacks_labels = {"labels", "decoder_input_ids"} <= {*names} - {*given}
    step, strategy, is_jax = model.predict_step, kind.strategy, kind.backend == "jax"
    prepare = getattr(model, "preprocess_samples", None)  # of KerasHub; its `predict` takes 3 s

    def run(data: Any) -> Any:
        if is_jax:  # whose step takes all variables and returns those that have changed
            groups = model.trainable_variables, model.non_trainable_variables
            state = tuple([variable.value for variable in group] for group in groups)
            outputs, values = step(state, tf.nest.map_structure(np.asarray, data))
            for variable, value in zip(groups[1], values):
                variable.assign(value)
            return outputs
        if not own:  # outside replicas: each has BatchNormalization statistics of its own
            with strategy.scope():
                return step(data)
        outputs = strategy.run(step, (data,))  # each replica is given the whole batch
        return tf.nest.map_structure(lambda x: strategy.experimental_local_results(x)[0], outputs)

    call = run
    # `predict` builds a model, and converts None, sparse and ragged tensors for JAX.
    leaves = tf.nest.flatten(first if own else inputs)
    is_ready = model.built and all(isinstance(leaf, tf.Tensor) for leaf in leaves)
    if own - {"predict_step"} or kind.backend == "torch" or (is_jax and not is_ready):
        call = lambda data: model.predict(tf.data.Dataset.from_tensors(data), verbose=0)
        prepare = None  # `predict` does it
    elif is_jax and model.jit_compile and not model.run_eagerly:
        step = sys.modules["jax"].jit(step)
    elif not is_jax and not model.run_eagerly:
        call = tf.function(run, reduce_retracing=True)

    def predict_batch(element: Any) -> Any:
        if prepare is not None:
            element = prepare(*(element if isinstance(element, tuple) else [element]))
        if own:  # which get the labels and all columns, as in `predict`
            return call(element)
        inputs, labels = _split(element)
        if lacks_labels:
            parts = inputs if isinstance(inputs, tuple) else (inputs,)
            inputs = inputs if isinstance(inputs, Mapping) else dict(zip(names, parts))
            answer = labels["labels"] if isinstance(labels, Mapping) else labels
            inputs = {**inputs, "labels": answer}
        elif columns:
            inputs = {name: inputs[name] for name in columns}
        return call((inputs,) if isinstance(inputs, tuple) else inputs)  # around all: costs 6%

    return predict_batch


def _select_outputs(model: Any, outputs: Any, output_cols: list[str] | None) -> Any:
    """Returns the outputs to keep: those chosen in a dict, all if they have no names."""
    names = list(outputs) if isinstance(outputs, Mapping) else []
    if not set(output_cols or []).issubset(names):
        raise ValueError(
            f"output_cols must name outputs of {type(model).__name__}, which are "
            f"{names or 'not named'}, but received {output_cols}."
        )
    if not names:
        return outputs
    config = getattr(model, "config", None)
    ignored = ["loss", *(getattr(config, "keys_to_ignore_at_inference", None) or [])]
    given = [name for name in names if outputs[name] is not None]
    chosen = output_cols or [name for name in given if name not in ignored] or given
    return {name: outputs[name] for name in chosen}


# Generation ---------------------------------------------------------------------------------------


def _generator(
    model: Any, first: Any, label_cols: list[str] | None, generate_kwargs: Any, use_xla: bool
) -> Callable[[Any], Any]:
    """Returns the function from an element, such as the first, to what `generate` makes of it.

    The answer is withheld, by name: "labels", the columns of the inputs that serve as labels and,
    of transformers, "decoder_...". The mask of a text goes where the text goes.
    """
    kind, (inputs, labels) = _kind_of(model), _split(first)
    configured: Callable[..., Any] = functools.partial(model.generate, **generate_kwargs)
    generate = configured
    named = labels if isinstance(labels, Mapping) else {}
    withheld = {"labels", *(set(label_cols or []) - named.keys())}
    is_transformers = kind.library == "transformers"
    if is_transformers:
        encoder = getattr(model, "encoder", None)  # whose inputs an encoder-decoder starts from
        main = getattr(encoder, "main_input_name", model.main_input_name)
        names = list(inspect.signature(model.call).parameters)  # of inputs in a tuple
        if not isinstance(inputs, Mapping):
            inputs = dict(zip(names, inputs)) if isinstance(inputs, tuple) else {main: inputs}
        withheld |= inputs.keys() - {*(_columns_taken(model, inputs) or inputs)}
        prompts = sorted(name for name in inputs if name.startswith("decoder_"))
        withheld = {*withheld, *prompts} - {main, "attention_mask"}
        withheld |= {"attention_mask"} if "input_ids" in withheld else set()
        shifted, answer = inputs.get("decoder_input_ids"), _labels_of(first, label_cols)
        both = [shifted, *tf.nest.flatten(answer)]
        is_shift = all(isinstance(x, tf.Tensor) and x.shape == shifted.shape for x in both)
        if is_shift:  # perhaps, as collators make them of the labels: (examples, tokens)
            shifted, answer = shifted.numpy()[:, 1:], both[1].numpy()[:, :-1]
            is_shift = ((shifted == answer) | (answer == PADDING)).all()
        if prompts and not is_shift:
            logger.warning("generate does not see %s; generate_kwargs may hold prompts.", prompts)
        generate = lambda columns: configured(**columns)
        generate = _compile_with_xla(generate) if use_xla else generate
    elif use_xla:
        logger.warning("use_xla_generation has no effect here, but compile(jit_compile=True) may.")

    def generate_batch(element: Any) -> Any:
        given = _split(element)[0]
        if is_transformers and not isinstance(given, Mapping):
            given = dict(zip(names, given)) if isinstance(given, tuple) else {main: given}
        if isinstance(given, Mapping):
            given = {name: column for name, column in given.items() if name not in withheld}
        if hasattr(model, "preprocessor") and isinstance(given, dict) and len(given) == 1:
            given = given.get("encoder_text", given)  # KerasHub takes a dict with decoder_text only
        if kind.backend != "tensorflow":  # which take arrays, but text as a tensor
            given = tf.nest.map_structure(lambda x: x if x.dtype == tf.string else x.numpy(), given)
        made = generate(given)
        if is_transformers and isinstance(made, Mapping):  # beams list the parts of their steps
            made = {n: tuple(x) if isinstance(x, list) else x for n, x in made.items()}
        return made

    return generate_batch


def _compile_with_xla(generate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns `generate` of transformers compiled with XLA, once for each width of the inputs.

    A smaller batch, such as the last, would cost a compilation of its own (2 s for a small T5). It
    is filled up to the largest batch of its width so far by repeating its last row; the surplus
    rows are dropped.
    """
    # Tracing a small T5 takes 9 s with AutoGraph and 0.7 s without (transformers 4.57). GPT2 and
    # Whisper, where Python's `if` and `while` decide on tensors, fail at once without.
    ways = [tf.function(generate, jit_compile=True, autograph=each) for each in (False, True)]
    compiled: dict[Any, tuple[int, Any]] = {}  # the largest batch so far and its graph, by width

    def generate_filled(columns: dict[str, Any]) -> Any:
        size = int(next(iter(columns.values())).shape[0])
        width = tuple((part.dtype, *part.shape[1:]) for part in columns.values())
        full, graph = compiled.get(width, (0, None))
        if size < full:
            rows = np.minimum(np.arange(full), size - 1)  # the last one repeated
            columns = {name: tf.gather(part, rows) for name, part in columns.items()}
        elif size > full:
            try:
                graph = ways[0].get_concrete_function(columns)
            except TypeError:
                ways[0] = ways[1]
                graph = ways[0].get_concrete_function(columns)
            full = size
            compiled[width] = full, graph
        generated = graph(columns)
        # (full * sequences per example, ...): generate may return several for each example
        return tf.nest.map_structure(lambda x: x.numpy()[: x.shape[0] * size // full], generated)

    return generate_filled


def _pad_token(model: Any, generate_kwargs: dict[str, Any]) -> int:
    """Returns the token that pads generated sequences: pad, else end token, else -100.

    It is looked up where `generate` of transformers does: a configuration that is given takes the
    place of the model's own.
    """
    given = generate_kwargs.get("generation_config")
    of_model = [getattr(model, name, None) for name in ("generation_config", "config")]
    places = [types.SimpleNamespace(**generate_kwargs), *([given] if given else of_model)]
    names = ("pad_token_id", "eos_token_id")
    tokens = [getattr(place, name, None) for name in names for place in places]
    token = next((each for each in tokens if each is not None), PADDING)
    return int(np.atleast_1d(token)[0])  # there may be several end tokens


# Padded concatenation, and what metric_fn makes of it ---------------------------------------------


def _to_numpy(batch: Any, token: int = PADDING, is_generated: bool = False) -> Any:
    """Returns the batch with arrays for tensors, masked ones for ragged, in its own nesting.

    A list of numbers or texts is a column. A list of tensors is a nesting, as in Keras' `predict`,
    but in what `generate` returned, where each entry is what one example gave.
    """
    if batch is None:
        return None
    if isinstance(batch, tf.Tensor):
        # A copy: what TensorFlow's threads free while the result is made stays with them.
        return np.atleast_1d(batch.numpy())
    if isinstance(batch, Mapping):
        return {n: _to_numpy(batch[n], _padding_of(n, token), is_generated) for n in batch}
    is_column = isinstance(batch, list) and all(map(np.isscalar, batch))
    if isinstance(batch, list) and is_generated and not is_column:
        batch = _concatenate([np.asarray(row)[None] for row in batch], token)  # (1, tokens) each
    if isinstance(batch, (list, tuple)) and not is_column:
        parts = [_to_numpy(part, token, is_generated) for part in batch]
        if isinstance(batch, list):
            return parts
        return tuple(parts) if type(batch) is tuple else type(batch)(*parts)
    if isinstance(batch, tf.RaggedTensor):  # row by row would take 66 times as long
        values = batch.flat_values.numpy()
        places = batch.with_flat_values(tf.range(len(values))).to_tensor(-1).numpy()
        rows = np.ma.array(values[places])
        rows[places < 0] = np.ma.masked
        return rows.shrink_mask()
    if isinstance(batch, tf.SparseTensor):
        batch = tf.sparse.to_dense(batch)
    array = np.atleast_1d(batch)
    if array.dtype == object and not isinstance(next(array.flat, ""), (str, bytes)):
        received = type(array.flat[0]).__name__
        raise TypeError(f"Predictions and labels must be numbers or texts, but are {received}.")
    return array


def _padding_of(column: Any, token: int) -> int:
    """Returns what pads the column of this name: masks with False, which is 0 in any dtype."""
    return False if str(column).endswith("mask") else token


def _concatenate(batches: list[Any], token: int = PADDING) -> Any:
    """Concatenates batches on axis 0 and pads every other axis at its end to the longest.

    Batches are arrays of shapes (examples, ...) or alike nestings of them. `token` pads integers.
    The peak of memory is the result plus one batch: `batches` is taken apart as it is copied.
    """
    first = batches[0]
    forms = {  # in a comprehension: a name that is left would keep the last batch in memory
        (type(each).__name__, *sorted(each))
        if isinstance(each, dict)
        else (type(each).__name__, getattr(each, "ndim", None) or len(each or ()))
        for each in batches
    }
    if len(forms) > 1:
        raise ValueError(f"All batches must have the same structure, but received {sorted(forms)}.")
    if first is None:
        return None
    if isinstance(first, dict):
        for name in {"scores", "logits"} & first.keys():  # of each step; generation may end early
            if isinstance(first[name], tuple):
                steps = max(len(batch[name]) for batch in batches)
                for each in batches:  # steps of shape (examples, 0), to be padded
                    each[name] += (each[name][0][:, :0],) * (steps - len(each[name]))
        tokens = {name: _padding_of(name, token) for name in first}
        return {n: _concatenate([batch.pop(n) for batch in batches], tokens[n]) for n in tokens}
    if isinstance(first, (list, tuple)):
        columns = [list(column) for column in zip(*batches)]
        batches.clear()
        joined = [_concatenate(column, token) for column in columns]
        return type(first)(joined) if type(first) in (list, tuple) else type(first)(*joined)
    return _join(batches, token)


def _join(arrays: list[Array], token: int) -> Array:
    """Concatenates arrays of shapes (examples, ...), which it removes from the list, with padding.

    Half precision becomes float32, text objects; else the dtype is kept, or has room for padding.
    """
    longest = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays)))
    is_padded = any(x.shape[1:] != longest or np.ma.is_masked(x) for x in arrays)
    dtypes = {array.dtype for array in arrays}
    dtype: np.dtype[Any] = np.result_type(*dtypes)
    padding: Any = token if dtype.kind in "iu" or token is False else PADDING
    if dtype.kind in "OSU":
        dtype, padding = np.dtype(object), ""
    elif dtype in (np.float16, tf.bfloat16.as_numpy_dtype):
        dtype = np.dtype(np.float32)
    if is_padded:
        dtype = np.promote_types(dtype, np.min_scalar_type(padding))
    if dtype.kind == "f" and all(each.kind in "iu" for each in dtypes):
        dtype = np.dtype(object)  # uint64 and a signed type: float64 would lose digits
    whole = np.empty((sum(map(len, arrays)), *longest), dtype)
    end = len(whole)  # whole: (all examples, longest, ...)
    is_utf_8: Any = lambda x: isinstance(x, bytes) and x.decode(errors="replace").encode() == x
    as_str: Any = np.frompyfunc(lambda x: x.decode() if is_utf_8(x) else x, 1, 1)
    while arrays:
        array = np.ma.filled(arrays.pop().astype(dtype, copy=False), padding)
        block = whole[end - len(array) : end]
        if array.shape != block.shape:
            block[...] = padding
        block[tuple(map(slice, array.shape))] = as_str(array) if padding == "" else array
        end -= len(array)
    return whole


def _numbers_in(values: Any, is_strict: bool = False) -> Row:
    """Returns the entries that are numbers, by name; an array of one axis gives one for each entry.

    What is neither is left out or, if `is_strict`, a TypeError.
    """
    numbers: Row = {}
    for name, value in values.items() if isinstance(values, Mapping) else [(None, values)]:
        array = np.empty((0, 0))
        with contextlib.suppress(ValueError):  # lists of different lengths
            array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)  # bfloat16 too
        if isinstance(name, str) and array.ndim < 2 and array.dtype.kind in "biufV":  # V: bfloat16
            entries = {f"{name}_{n}": entry for n, entry in enumerate(array.reshape(-1).tolist())}
            numbers |= entries if array.ndim else {name: array.item()}
        elif is_strict:
            raise TypeError(
                "metric_fn must return a dict of metric names to numbers, or arrays of one axis, "
                f"but returned {value!r}{f' for {name!r}' if isinstance(values, Mapping) else ''}."
            )
    return numbers


# Saving and checkpoint ----------------------------------------------------------------------------


def _count_updates(model: Any) -> int:
    """Returns the batches that the optimizer has counted, since Keras 3.15 does not tell them.

    With several steps in one execution the batch index that callbacks get is too high in the last
    execution of an epoch, and of endless data more than `steps_per_epoch` are trained.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # in a loss scale's
    in_each = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    return int(np.asarray(optimizer.iterations)) * in_each


def _check_free_space(model: Any, folder: Path, has_checkpoint: bool) -> None:
    """Raises an OSError where the variables cannot fit: HDF5 ends the process on a full disk."""
    writes_states = _kind_of(model).library in ("keras", "tf-keras")  # with the model
    size, own = 2**20, len(model.variables)  # bytes, at first for all that is no variable
    for number, (variable, _) in enumerate(_variables_of(model).values()):
        copies = has_checkpoint + (writes_states or number < own)
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # it has no single shape
            size += copies * math.prod(variable.shape) * tf.as_dtype(variable.dtype).size
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(errno.ENOSPC, f"No space left on the disk: {size} bytes needed, {free} free")


def _publish(folder: Path, output_dir: Path, known: set[str]) -> list[str]:
    """Puts all files into `output_dir`, each in the place of its predecessor; returns their names.

    They stay in `folder` as well, for the upload, which no later save can change there.
    `known` are the files that it may replace without a word; those of this save are added.
    """
    names = _list_files(folder, [])
    if old := [name for name in names if name not in known and (output_dir / name).exists()]:
        logger.warning("Files of %s that this and further saves replace: %s.", output_dir, old)
    link = folder / PRIVATE
    for number, name in enumerate(names):
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # no file there yet, or a disk without links
            os.link(folder / name, link)
            # Keeps the old file until the upload removes it: to free 256 MiB takes ext4 0.05 s.
            os.link(output_dir / name, f"{link}{number}")
        if not link.exists():
            shutil.copyfile(folder / name, link)
        os.replace(link, output_dir / name)
    known.update(names)
    return names


def _variables_of(model: Any) -> dict[str, tuple[Any, bool]]:
    """Returns by description the variables of a model, then those of all optimizers it holds.

    Optimizers may stand in attributes, lists, tuples and dicts of layers. With each variable comes
    whether Keras' `save_weights` fails to give it back: those of optimizers without `build` (the
    legacy ones of tf_keras, and AdamWeightDecay of transformers), in tf_keras 2.21 learning rates
    and optimizers in lists in dicts, and in Keras 3.15 what is no weight, as the states of random
    generators, and layers with LoRA, whose matrices are merged into the kernel.
    """
    keras, parts = _kind_of(model).keras, _parts_of(model)
    kept, trained = ({id(x) for x in own} for own in (model.weights, model.trainable_variables))
    states: dict[str, tuple[Any, bool]] = {}
    for place, _, value in parts.values():
        if getattr(value, "lora_enabled", False):
            kept -= {id(each) for each in value.variables}
        elif hasattr(value, "apply_gradients"):  # an optimizer
            place = f"{place} ({type(value).__name__})"
            own = value.variables() if callable(value.variables) else value.variables
            is_kept = hasattr(keras, "ops") or value is model.optimizer and hasattr(value, "build")
            for n, each in enumerate(own):
                states[f"{place}.{n}, {each.shape}"] = each, not is_kept
            if hasattr(rate := getattr(value, "learning_rate", None), "assign"):
                states[f"{place}.learning_rate"] = rate, True
    found: dict[str, tuple[Any, bool]] = {}
    for n, each in enumerate(model.variables):  # in the order that optimizers go by
        place, layer, _ = parts.get(id(each), (f"variable {n}", "no layer", None))
        text = f"{place} of {layer}, {getattr(each, 'shape', None)}, trained: {id(each) in trained}"
        found[text] = each, id(each) not in kept
    return found | states


def _write_checkpoint(model: Any, rows: dict[int, Row], file: Path) -> None:
    """Writes what a resumed training needs: Keras' own weights file, with a group of ours in it.

    The group holds the variables that Keras leaves out and, as JSON (in a data set, since HDF5
    limits attributes), the logs by epoch and descriptions of all variables and arrays.
    """
    variables = _variables_of(model)
    model.built = True  # Keras 3.15 refuses what was never called, such as a GAN
    model.save_weights(str(file))
    with h5py.File(file, "a") as opened:
        for number, (variable, is_left_out) in enumerate(variables.values()):
            if is_left_out:
                value, is_bfloat16 = variable.numpy(), "bfloat16" in str(variable.dtype)
                opened[f"{LEFT_OUT}/{number}"] = value.astype("float32") if is_bfloat16 else value
        state = {"history": rows, "variables": [*variables], "arrays": _arrays_in(opened)}
        opened[STATE] = json.dumps(state)


def _arrays_in(opened: Any) -> list[str]:
    """Returns name, dtype and shape of the arrays in an HDF5 file, but for STATE."""
    items: dict[str, Any] = {}
    opened.visititems(lambda name, item: items.update({name: item}))
    items.pop(STATE, None)
    return [f"{n}: {x.dtype} {x.shape}" for n, x in items.items() if isinstance(x, h5py.Dataset)]


# Hub sync -----------------------------------------------------------------------------------------

_uploads: dict[str, _Upload] = {}  # the newest upload to each repository, of whichever callback
_clock = types.SimpleNamespace(now=time.monotonic, wait=threading.Event.wait)  # for tests
TRANSIENT = (408, 409, 412, 423, 425, 429)  # statuses after which to try again, apart from 5xx
NETWORK_ERRORS = set("""
    ConnectionError TimeoutError gaierror Timeout ChunkedEncodingError TransportError
""".split())  # of the connection: Python's, those of requests, and those of httpx and httpx2


@dataclasses.dataclass(eq=False)
class _Upload:
    """One save on its way to the Hub, in a thread of its own.

    It shares nothing with the callback but the values it was given. The thread is a daemon: a
    script that ends may cut it off; the Hub then keeps the commit before; `output_dir` is whole.
    """

    api: Any
    repo_id: str
    output_dir: Path
    folder: Path  # with the files of the save, removed at the end
    names: list[str]  # of these files, then of all that is pushed
    message: str
    is_final: bool
    size: int  # bytes
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)  # no more attempts
    future: Any = dataclasses.field(default_factory=concurrent.futures.Future)  # of a CommitInfo

    def fail(self, error: BaseException) -> None:
        """Logs that a push failed, but for the final one, which is reported elsewhere."""
        if not self.is_final and not self.stop.is_set():
            logger.warning(
                '"%s" was not pushed to %s/%s: %s. It, or a later save, is complete in %s.',
                self.message, self.api.endpoint, self.repo_id, _diagnose(error)[0], self.output_dir,
            )
        self.future.set_exception(error)

    def run(self, predecessor: _Upload | None, shows_bars: bool) -> None:
        """Completes the snapshot and attempts the commit until it is made, refused or given up.

        The state of the predecessor, to the same repository, must not follow this one.
        """
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
                self.take_snapshot()
                if predecessor is not None:
                    predecessor.stop.set()
                    concurrent.futures.wait([predecessor.future], BACKGROUND_SECONDS)
                is_settled = shows_bars or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
                if not (is_settled or hub_utils.are_progress_bars_disabled()):
                    hub_utils.disable_progress_bars()  # they would be drawn into Keras' own
                    stack.callback(hub_utils.enable_progress_bars)
                seconds = FINAL_SECONDS if self.is_final else BACKGROUND_SECONDS
                result = _attempt(self.api, self.commit, seconds, self.stop)
            self.future.set_result(result)
        except BaseException as error:
            self.fail(error)

    def take_snapshot(self) -> None:
        """Copies the files of the save, which are links until now, and the user's.

        The space for the next save is left free; the final one, which no other follows, stays
        links. Somebody may be writing or removing the user's: they are left out where they cannot
        be copied, or have names that are not UTF-8.
        """
        for replaced in self.folder.glob(f"{PRIVATE}*"):
            replaced.unlink(missing_ok=True)
        reserve = 0 if self.is_final else self.size + 2**21
        ours, left_out, copied = self.names, [], self.folder / PRIVATE
        theirs = [n for n in _list_files(self.output_dir, NEVER_PUSHED) if n not in ours]
        for name in theirs if self.is_final else ours + theirs:
            source = (self.folder if name in ours else self.output_dir) / name
            try:
                name.encode()
                if shutil.disk_usage(self.folder).free < source.stat().st_size + reserve:
                    raise OSError(errno.ENOSPC, "No space left on the disk beside the next save")
                shutil.copyfile(source, copied)
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(copied, self.folder / name)
            except (OSError, UnicodeError) as error:
                if name in ours:
                    raise
                copied.unlink(missing_ok=True)  # it may be there in part
                left_out.append(f"{name!r} ({type(error).__name__}: {error})")
        if left_out:
            logger.warning("Not pushed, since it could not be copied: %s.", "; ".join(left_out))
        self.names = _list_files(self.folder, [])
        self.size = sum((self.folder / name).stat().st_size for name in self.names)

    def commit(self) -> Any:
        """Commits the snapshot on top of the newest commit, without the card if that is refused."""
        head = self.api.model_info(self.repo_id)
        # Whoever pushes a newer state sets `stop` before it reads its head. Either this is seen
        # here, or its head is no older than this one, and of two commits on one head the Hub
        # refuses the later: a state never follows a newer one.
        if self.stop.is_set():
            raise InterruptedError("a newer state is pushed, or the wait for it has ended")
        if CARD in self.names and CARD in {file.rfilename for file in head.siblings or []}:
            theirs = self.api.hf_hub_download(self.repo_id, CARD, local_dir=self.folder / PRIVATE)
            if _kept_metadata(Path(theirs)) is None:
                _warn_once("%s has a model card by a human: it stays as it is.", self.repo_id)
                self.names.remove(CARD)
        options = {"commit_message": self.message, "parent_commit": head.sha}
        add = huggingface_hub.CommitOperationAdd
        try:
            files = [add(name, str(self.folder / name)) for name in self.names]
            return self.api.create_commit(self.repo_id, files, **options)
        except (ValueError, Warning) as error:  # a UserWarning with `python -W error`
            if CARD not in self.names:
                raise
            logger.warning("Pushing without the model card: %s", _diagnose(error)[0])
            self.names.remove(CARD)
            return self.commit()


def _open_repo(api: Any, name: str, output_dir: Path) -> tuple[str, set[str], dict[str, Any]]:
    """Creates repository and folder unless they exist, and finds out whether both can be written.

    Returns the repository's full name, the files in the folder, and the metadata to keep of a card
    on the Hub.
    """
    # create_repo accepts a repository that exists, whoever owns it. The request before an upload
    # checks the right to write, and leaves no commit.
    repo_id = str(api.create_repo(name, exist_ok=True).repo_id)
    api.preupload_lfs_files(repo_id, [huggingface_hub.CommitOperationAdd(CARD, b"-")])
    on_hub = {file.rfilename for file in api.model_info(repo_id).siblings or []}
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PRIVATE, dir=output_dir) as folder:
        if CARD in on_hub:
            api.hf_hub_download(repo_id, CARD, local_dir=folder)
        kept = _kept_metadata(Path(folder, CARD)) or {}
    for left in output_dir.glob(f"{PRIVATE}*"):  # by a run that was killed
        with contextlib.suppress(FileNotFoundError):  # another worker's, which has removed it
            if left.stat().st_mtime < time.time() - 24 * 60 * 60:
                shutil.rmtree(left, ignore_errors=True)
    files = set(_list_files(output_dir, NEVER_PUSHED))
    if new := sorted(files - on_hub):
        logger.warning(
            "Files in %s that will be pushed to %s/%s with each save, or replaced by files of a "
            "save that have their names: %d, such as %s.",
            output_dir, api.endpoint, repo_id, len(new), ", ".join(new[:5]),
        )
    return repo_id, files, kept


def _list_files(folder: Path, left_out: list[str]) -> list[str]:
    """Returns the files in a folder but those of these patterns; no links to folders."""
    paths = [Path(parent, name) for parent, _, files in os.walk(folder) for name in files]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return list(hub_utils.filter_repo_objects(names, ignore_patterns=left_out))


def _attempt(
    api: Any, action: Callable[[], Any], seconds: float, stop: threading.Event | None = None
) -> Any:
    """Returns what `action` returns; attempted again for `seconds` from its first failure on.

    Waits double up to LONGEST_WAIT, and the last attempt is made at the limit. What the Hub asks
    for takes precedence. `stop` ends the waits.
    """
    stop, deadline, wait = stop or threading.Event(), math.inf, FIRST_WAIT
    while True:
        try:
            return action()
        except Exception as error:
            text, asked, is_network = _diagnose(error)
            deadline = min(deadline, _clock.now() + seconds)
            left = deadline - _clock.now()
            if asked >= left or stop.is_set():
                if is_network:
                    raise ConnectionError(f"{api.endpoint} could not be reached: {text}") from error
                raise
        _clock.wait(stop, min(asked or min(wait * random.uniform(1, 1.5), LONGEST_WAIT), left))
        wait *= 2


def _diagnose(error: BaseException) -> tuple[str, float, bool]:
    """Returns an error and its root cause in one line, the wait for another attempt, and whether
    the connection failed.

    The wait is what the Hub asks for in seconds (`Retry-After` of RFC 9110, section 10.2.3, or `t`
    of the header RateLimit), 0 if it does not ask, and infinite where no attempt can help.
    """
    chain: list[Any] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) not in (None, *chain):
        chain.append(cause)
    text, root = (" ".join(f"{type(x).__name__}: {x}".split()) for x in (error, chain[-1]))
    text = text if root in text else f"{text} because of {root}"
    responses = [each.response for each in chain if getattr(each, "response", None) is not None]
    if responses:  # of an LFS upload it is in a cause
        status, headers = responses[0].status_code, responses[0].headers
        if status not in TRANSIENT and status < 500:
            return text, math.inf, False
        asked = re.match(r"\d+", headers.get("Retry-After", ""))
        asked = asked or re.search(r"(?<=r=0;t=)\d+", headers.get("RateLimit", ""))  # r: remaining
        return text, float(asked[0]) if asked else 0.0, False
    names = {cls.__name__ for each in chain for cls in type(each).__mro__}
    is_network = bool(names & NETWORK_ERRORS) and "OfflineModeIsEnabled" not in names
    return text, 0.0 if is_network else math.inf, is_network


# Model card ---------------------------------------------------------------------------------------

CARD_MARKS = (  # what a generated card says: ours, and that of transformers
    "<!-- Generated by keras_callbacks.",
    "generated automatically according to the information Keras had access to",
)
PACKAGES = """
    keras tf_keras keras_hub transformers tensorflow jax torch numpy huggingface_hub
""".split()
METADATA = re.compile(r"\A\s*---\n.*?^---[ \t]*(\n|\Z)", re.DOTALL | re.MULTILINE)
KEPT = "kept_metadata"  # lists the metadata that a card had before it was ours
_warn_once = functools.cache(logger.warning)


def _kept_metadata(card: Path) -> dict[str, Any] | None:
    """Returns the metadata to keep of a card that may exist; None if a human wrote it.

    Of metadata alone, such as the website makes of a licence, all is kept, and for good.
    """
    text = card.read_text("utf-8", errors="replace") if card.exists() else ""
    is_bare = not METADATA.sub("", text).strip()
    if not is_bare and not any(mark in text for mark in CARD_MARKS):
        return None
    with contextlib.suppress(Exception):  # there is none, or YAML that somebody has broken
        found = huggingface_hub.metadata_load(card) or {}
        names = found if is_bare else found.get(KEPT, [])
        return {name: found[name] for name in names if name in found}
    return {}


def _fingerprint(model: Any) -> tuple[int, ...]:
    """Returns the sum of the bits of each variable, which tells weights of epochs apart.

    It is empty, and stands for no epoch, if this process cannot read the values.
    """
    is_tensorflow, sums = _kind_of(model).backend == "tensorflow", []
    with contextlib.suppress(Exception):  # RuntimeError, or one of TensorFlow's own
        for variable in model.weights:
            if not hasattr(variable, "assign"):  # a vocabulary of tf_keras
                continue
            value = tf.convert_to_tensor(variable) if is_tensorflow else variable  # not copied
            data = np.asarray(value).reshape(-1).view(np.uint8)
            words = data[: len(data) // 8 * 8].view(np.uint64)
            sums.append(int(words.sum()) + int(data[words.nbytes :].sum()))
        return tuple(sums)
    return ()


def _model_card(
    model: Any, facts: dict[str, Any], kept: dict[str, Any], rows: dict[int, Row], epoch: int | None
) -> str:
    """Returns the text of the card.

    `facts` are the user's and those of `fit`, `kept` is metadata that takes precedence, `epoch` the
    one at whose end the weights were these.
    """
    kind, optimizer = _kind_of(model), getattr(model, "optimizer", None)
    row: Row = {} if epoch is None else rows.get(epoch, {})
    lists: dict[str, list[str]] = {}
    for key in CARD_ARGS:  # a name, a data set of the datasets library, or several
        values = facts.get(key)
        values = values if isinstance(values, (list, tuple)) else [values]
        names = (getattr(each, "builder_name", None) or each for each in values)
        lists[key] = [" ".join(str(n).split()) for n in names if isinstance(n, (str, int, float))]
    first = {key: next(iter(lists[key]), "") for key in lists}
    name, base, tasks = facts["repo_id"].split("/")[-1], first["finetuned_from"], lists["tasks"]
    guess = str(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    if not base and not Path(guess).exists():  # Path("") is ".", which exists
        base = guess
    own = {"loss", "lr", "learning_rate", "val_loss"}
    with contextlib.suppress(ValueError):  # outside `fit` they may have no result yet
        own |= set(model.get_metrics_result())
    results = {" ".join(m.split()): v for m, v in row.items() if m not in own and math.isfinite(v)}
    dataset = first["dataset"] or first["dataset_tags"]
    evaluations = [
        huggingface_hub.EvalResult(
            task, first["dataset_tags"] or dataset, dataset, metric, value,
            dataset_config=first["dataset_args"] or None,
            metric_name=metric,
        )
        for task, (metric, value) in itertools.product(tasks if dataset else [], results.items())
    ]
    metadata: Any = huggingface_hub.ModelCardData(
        language=lists["language"] or None,
        license=first["license"] or None,
        library_name=kind.library,
        tags=[*lists["tags"], "generated_from_keras_callback"],
        base_model=base if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base) else None,
        datasets=lists["dataset_tags"] or None,
        pipeline_tag=tasks[0] if len(tasks) == 1 else None,
        metrics=sorted(results) or None,
        model_name=name,
        eval_results=evaluations or None,
    )
    summary, data = f"A {type(model).__name__}", " and ".join(lists["dataset"])
    summary += f", fine-tuned from {_as_text(base)}" if base else ""
    summary += f", trained on {_as_text(data)}" if data else ""
    note = "The results of exactly these weights are not known."
    if epoch is not None:
        note = f"Results of epoch {epoch}, at whose end the weights were exactly these, are below."
    config = {"class_name": type(optimizer).__name__, **optimizer.get_config()} if optimizer else {}
    plain = lambda x: x.item() if hasattr(x, "item") else str(x)  # NumPy's numbers
    columns = list(dict.fromkeys(itertools.chain(*rows.values())))
    table = [["Epoch", *map(_as_text, columns)], ["---:"] * (1 + len(columns))]
    for done, logs in sorted(rows.items()):
        table.append([str(done), *(f"{logs[c]:.4g}" if c in logs else "" for c in columns)])
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    versions = (f"{n} {sys.modules[n].__version__}" for n in PACKAGES if n in sys.modules)
    return f"""---
{huggingface_hub.CardData(**metadata.to_dict() | kept | {KEPT: sorted(kept) or None}).to_yaml()}
---

{CARD_MARKS[0]} Complete the card, then remove this comment: the card is yours from then on. -->

# {_as_text(name)}

{summary}. {note}

Intended uses, limitations and data: more information needed.

## How to load it

```python
{_loading_code(model, facts["repo_id"], facts["tokenizer"])}
```

## Hyperparameters

- precision: {model.dtype_policy.name}
- epochs: {facts["epochs"] or "unknown"} of {facts["steps"] or "an unknown number of"} steps
- optimizer:

```json
{json.dumps(config, indent=2, default=plain)}
```

## Results by epoch

{lines}

Versions: {", ".join(versions)}.
"""


def _as_text(text: Any) -> str:
    """Returns text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]|#~<>&])", r"\\\1", " ".join(str(text).split()))


def _loading_code(model: Any, repo_id: str, tokenizer: Any) -> str:
    """Returns the Python that loads the model from the Hub, and its tokenizer.

    It imports the packages that parts of the model come from, so that Keras finds these by name.
    """
    kind, name, config = _kind_of(model), type(model).__name__, ""
    home = type(model).__module__.split(".")[0].replace("keras_hub", "keras_hub.models")
    if kind.library in ("keras", "tf-keras"):
        config = json.dumps(kind.keras.saving.serialize_keras_object(model))
    options = ", safe_mode=False" if re.search('"__lambda__"|"lambda"', config) else ""
    file = f'huggingface_hub.hf_hub_download("{repo_id}", "model.keras")'
    load = {
        "transformers": f'{home}.{name}.from_pretrained("{repo_id}")',
        "keras-hub": f'{home}.{name}.from_preset("hf://{repo_id}")',
        "keras": f'keras.saving.load_model("hf://{repo_id}"{options})',
        "tf-keras": f"{kind.keras.__name__}.models.load_model({file}{options})",
    }
    code = f"model = {load[kind.library]}"
    if type(tokenizer).__module__.startswith("transformers."):
        name = type(tokenizer).__name__
        code += f'\ntokenizer = transformers.{name}.from_pretrained("{repo_id}")'
    parts = set(re.findall(r'"module": "(\w+)', config)) - {"builtins", "keras", "__main__"}
    named = re.findall(r"[ (](\w+)\.", code)
    return f"import {', '.join(sorted(parts.union(named)))}\n\n{code}"
