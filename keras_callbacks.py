# Copyright (c) 2026 The keras_callbacks authors
# SPDX-License-Identifier: MIT
"""Two callbacks for Keras' `fit`: metrics in plain Python, and pushing to the Hugging Face Hub.

`KerasMetricCallback` predicts (or generates) a whole evaluation set at the end of each epoch and
hands it to a function of yours. `PushToHubCallback` saves the model while it trains and commits it
to a repository on the Hub. Their interface is the one that transformers 4.34 documents under "Keras
callbacks"; any Keras model will do: Keras 3 on each backend, tf_keras, KerasHub, transformers.

To vendor it, copy this one file into your project. It needs tensorflow, numpy and huggingface_hub.
MIT licence, see the LICENSE file beside it or https://opensource.org/license/mit.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import email.utils
import enum
import functools
import glob
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
import types
import uuid
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock  # it and tqdm come with huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import numpy as np
import tensorflow as tf
from tqdm import tqdm

__version__ = "1.0.0"
__all__ = ["IntervalStrategy", "KerasMetricCallback", "PushToHubCallback", "load_repo_checkpoint"]

logger = logging.getLogger(__name__)
hub_utils: Any = huggingface_hub.utils
Array = np.ndarray[Any, Any]
Row = dict[str, "int | float"]  # the logs of one epoch

PADDING = -100  # what collators pad labels with, and what losses ignore
FIRST_WAIT = 1.0  # seconds before the second attempt; doubles with each further one
LONGEST_WAIT = 30.0  # seconds between two attempts, unless the Hub asks for more
CREATION_SECONDS = 10.0  # how long after its first failure a single request is attempted again
BACKGROUND_SECONDS = 60.0  # the same for a push while training goes on
FINAL_SECONDS = 300.0  # the same for the push of the final state
ATTEMPT_SECONDS = 300.0  # how long one attempt may take, plus the time for its bytes
SLOWEST_LINK = 100_000  # bytes a second that this time is for
CARD = "README.md"
CHECKPOINT = "checkpoint/state.npz"
STALE_CHECKPOINT = "checkpoint/stale.npz"  # older than the model beside it
RESCUED = "rescued_weights.npz"  # of a model that could not be saved
PRIVATE = ".keras_callbacks-"  # how the private folders of saves begin
NEVER_PUSHED = """
    .* *.env *.pem *.key *.p12 *.pfx *.ppk id_rsa* id_dsa* id_ecdsa* id_ed25519* credentials*
    client_secret* kaggle.json token token.txt stored_tokens _netrc
""".split()  # hidden files and files that may hold a secret, at any depth of output_dir


class IntervalStrategy(str, enum.Enum):
    """When PushToHubCallback saves; any case, and any enum with these values, is accepted."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


class EvalPrediction(NamedTuple):
    """What a `metric_fn` with a single required parameter receives."""

    predictions: Any
    label_ids: Any


class _AnyKerasCallback(tf.keras.callbacks.Callback):  # type: ignore[misc]
    """A callback for the `fit` of Keras 3 and of tf_keras, whichever of them `tf.keras` is."""

    # tf_keras calls these three methods of each callback; the Callback of Keras 3 lacks them.
    def _implements_train_batch_hooks(self) -> bool:
        return False

    _implements_test_batch_hooks = _implements_train_batch_hooks
    _implements_predict_batch_hooks = _implements_train_batch_hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies the callback alone: neither tf.data pipelines nor uploads can be copied."""
        return copy.copy(self)

    def _fit_argument(self, name: str) -> Any:
        """Returns what `fit` was given by this name, None where there is no `fit`."""
        return (getattr(self, "params", None) or {}).get(name)


class KerasMetricCallback(_AnyKerasCallback):
    """Computes metrics in plain Python at the end of every epoch and adds them to the epoch's logs.

    Unlike Keras' own metrics, `metric_fn` sees the whole evaluation set at once, as NumPy arrays,
    and need not be compilable: ROUGE, BLEU, macro-F1 or exact match of generated text can be
    computed with any library. History, the progress bar and the callbacks listed after this one see
    the results.

    ```python
    def macro_f1(predictions, labels):  # (examples, classes) float32, (examples,) int64
        return {"f1_macro": f1_score(labels, predictions.argmax(-1), average="macro")}

    model.fit(train_dataset, callbacks=[KerasMetricCallback(macro_f1, eval_dataset)])
    ```

    Args:
        metric_fn: Called as `metric_fn(predictions, labels)`. A function with exactly one required
            positional parameter gets one named tuple `(predictions, label_ids)` instead, unless a
            second parameter is called `labels`. Both hold fresh, writable arrays of shape
            (examples, ...), or dicts of them by column, or whatever nesting the model returns;
            labels are None where the data have none. Batches of different widths are padded at the
            end: numbers with -100, generated tokens with the pad token (else the end token), text
            with the empty string. Half precision arrives as float32, text as `str`. Returns a dict
            of metric names to numbers.
        eval_dataset: A batched `tf.data.Dataset`, or, together with `batch_size`, a dict, a tuple,
            an array or a tensor. Its elements are `inputs`, `(inputs, labels)` or `(inputs, labels,
            sample_weight)`; it is read once per epoch.
        output_cols: Names of the model's outputs to keep, when it returns a dict. Defaults to all
            but "loss" and what the model's configuration ignores at inference. Has no effect on
            `generate` that returns nothing but tokens.
        label_cols: Names of columns of the labels or of the inputs to use as labels; an empty list
            for none. Defaults to the labels of a tuple; of a dict, to the column "labels", else to
            "start_positions" and "end_positions".
        batch_size: Examples per batch, for data that are not a `tf.data.Dataset`; else ignored.
        predict_with_generate: Whether predictions come from `model.generate`. Defaults to False.
        use_xla_generation: Whether to compile the `generate` of transformers models with XLA, once
            for each width of the inputs. Defaults to False.
        generate_kwargs: Keyword arguments for every call of `model.generate`. Defaults to none.

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
        self.metric_fn = metric_fn
        self._takes_pair = _takes_pair(metric_fn)
        self.eval_dataset = _as_dataset(eval_dataset, batch_size)
        self.batch_size = batch_size
        self.output_cols = [output_cols] if isinstance(output_cols, str) else output_cols
        self.label_cols = _find_label_columns(self.eval_dataset.element_spec, label_cols)
        self.predict_with_generate = predict_with_generate
        self.use_xla_generation = use_xla_generation
        self.generate_kwargs = dict(generate_kwargs or {})
        self._replaced: set[str] = set()  # metric names already warned about
        self._made_from: list[Any] = []  # what the compiled function depends on
        self._key: list[Any] = []  # the ids of these, and the settings when it was compiled
        self._compiled: Callable[..., Any] | None = None  # None where Keras' own `predict` runs
        self._main_input: str | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refuses, before the first epoch, what the model cannot do."""
        model = self.model
        if self.predict_with_generate:
            _check_generation(self)
        elif self.output_cols and _is_functional(model) and not _customises_predict(model):
            _select_outputs(model, getattr(model, "output", None), self.output_cols)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Evaluates the whole set in one pass and adds what `metric_fn` returns to `logs`."""
        logs = {} if logs is None else logs
        self._prepare()
        run = self._generate_batch if self.predict_with_generate else self._predict_batch
        predictions: list[Any] = []
        labels: list[Any] = []
        # tqdm: None hides the bar off a terminal. "auto" is the default of `fit`.
        hidden = None if self._fit_argument("verbose") in (1, "auto") else True
        bar = {"desc": "Evaluating", "unit": "batch", "delay": 2, "leave": False, "disable": hidden}
        with tqdm(self.eval_dataset, **bar) as elements:
            for element in elements:
                targets = _labels_of(element, self.label_cols)
                if not labels:
                    _check_batched(targets)
                predictions.append(_to_numpy(run(element)))
                labels.append(_to_numpy(targets))
        self._key[-1] = _settings_text(self)  # Whisper's `generate` changes some settings itself
        if not predictions:
            raise ValueError("eval_dataset must give at least one batch, but it gave none.")
        token = _pad_token(self) if self.predict_with_generate else PADDING
        pair = EvalPrediction(_concatenate(predictions, token), _concatenate(labels))
        metrics = _check_metrics(self.metric_fn(pair) if self._takes_pair else self.metric_fn(*pair))
        if replaced := metrics.keys() & logs.keys() - self._replaced:
            logger.warning("metric_fn replaces %s in the logs of this epoch.", sorted(replaced))
            self._replaced |= replaced
        logs.update(metrics)

    def _prepare(self) -> None:
        """Compiles prediction or generation anew when something it depends on has changed.

        A trace holds on to the model, its variables and the settings of generation, and to how the
        model was compiled: `compile` resets Keras' own predict function.
        """
        model = self.model
        uses_predict = not _is_tensorflow(model) or _customises_predict(model)
        if not uses_predict:
            model.make_predict_function()
        made_from = [model, model.predict_function, *_variables_in(model)]
        key = [*map(id, made_from), model.run_eagerly, uses_predict, _settings_text(self)]
        if key == self._key:
            return
        self._made_from, self._key = made_from, key  # kept alive, so that no id is used again
        if self.predict_with_generate:
            self._main_input = _main_input(model)
            self._compiled = functools.partial(model.generate, **self.generate_kwargs)
            if self.use_xla_generation and _is_transformers(model):
                self._compiled = _XlaGenerate(self._compiled)
        elif uses_predict:
            self._compiled = None
        else:
            # A bare step takes 0.5 ms a batch, `predict` 4 to 6. It is not wrapped in a function of
            # ours: on Python 3.13 AutoGraph cannot transform one, and warns.
            step = model.predict_step
            self._compiled = step if model.run_eagerly else tf.function(step, reduce_retracing=True)

    def _predict_batch(self, element: Any) -> Any:
        """Returns the outputs for one batch that Keras' own `predict` would give."""
        model, element = self.model, _choose_columns(self.model, element)
        inputs = _split(element)[0]
        if self._compiled is not None:  # wrapping a single tensor in a tuple costs 6%
            outputs = self._compiled((inputs,) if isinstance(inputs, tuple) else inputs)
        elif getattr(model.predict, "__module__", "").startswith("keras_hub."):
            # Its `predict` would make a pipeline of the preprocessor anew for each batch: 3 s.
            parts = element if isinstance(element, tuple) else (element,)
            ready = tf.data.Dataset.from_tensors(model.preprocess_samples(*parts))
            outputs = _keras_of(model).Model.predict(model, ready, verbose=0)
        elif not _customises_predict(model) and _is_dense(inputs):
            outputs = model.predict_on_batch(_to_backend(inputs))
        else:
            outputs = model.predict(tf.data.Dataset.from_tensors(element), verbose=0)
        return _select_outputs(model, outputs, self.output_cols)

    def _generate_batch(self, element: Any) -> Any:
        """Returns what `generate` makes of one batch's inputs, with the answers withheld."""
        assert self._compiled is not None
        main, others = _question(self.model, self._main_input, element, self.label_cols)
        generated = self._compiled(main, **others)
        if isinstance(generated, list) and not isinstance(generated[0], (str, bytes)):
            rows = [np.asarray(tokens)[None] for tokens in generated]  # (1, tokens) each
            return _concatenate(rows, _pad_token(self))
        if not isinstance(generated, Mapping):
            return generated
        return _select_outputs(self.model, generated, self.output_cols)


class PushToHubCallback(_AnyKerasCallback):
    """Saves the model while it trains and pushes each save to the Hugging Face Hub.

    Uploads run in the background. Training goes on meanwhile; saves made during an upload stay local,
    and the next save after it is pushed. When training ends the final state is pushed and awaited.
    Whatever the Hub does, `fit` goes on, and `output_dir` holds the newest save, each file whole.

    ```python
    push_to_hub = PushToHubCallback("./digits", hub_model_id="user/digits", license="mit")
    model.fit(train_dataset, callbacks=[push_to_hub])
    ```

    Args:
        output_dir: The folder that holds the newest save and is kept in sync with the repository.
            It may exist and hold other files; they are pushed too, except hidden ones and those
            named like secrets (`NEVER_PUSHED`).
        save_strategy: "epoch" saves at the end of each epoch, "steps" every `save_steps` batches,
            "no" only when training ends, which the other two do as well. Defaults to "epoch".
        save_steps: Batches between saves, counted over the whole `fit`. Needed for "steps".
        tokenizer: A tokenizer or processor to save beside the model. Defaults to none.
        hub_model_id: The repository, "name" or "owner/name". Defaults to the name of `output_dir`.
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
        NotADirectoryError: `output_dir` is a file.
        huggingface_hub.utils.HfHubHTTPError: The Hub refuses the token or the repository.
        ConnectionError: The Hub cannot be reached.
        RuntimeError: The model cannot be saved (raised when training begins if that can be known
            then), or a save could not be written during `fit`.
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
        strategy = str(getattr(save_strategy, "value", save_strategy)).lower()
        choices = [each.value for each in IntervalStrategy]
        if strategy not in choices:
            raise ValueError(
                f"save_strategy must be one of {choices}, but received {save_strategy!r}."
            )
        if strategy == "steps" and not _is_positive_integer(save_steps):
            raise ValueError(
                'save_steps must be a positive integer when save_strategy is "steps", '
                f"but received save_steps={save_steps!r}."
            )
        if checkpoint and strategy != "epoch":
            raise ValueError(
                'checkpoint=True needs save_strategy="epoch", since training resumes at the start '
                f"of an epoch, but received save_strategy={strategy!r}."
            )
        savers = ("save_pretrained", "save_to_preset")
        if tokenizer is not None and not any(hasattr(tokenizer, name) for name in savers):
            raise TypeError(
                f"tokenizer must have a method save_pretrained or save_to_preset, "
                f"but received {type(tokenizer).__name__}."
            )
        if unknown := sorted(model_card_args.keys() - set(CARD_ARGS)):
            raise TypeError(f"model_card_args must be among {CARD_ARGS}, but received {unknown}.")
        self.output_dir = Path(os.path.abspath(os.path.expanduser(output_dir)))
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise NotADirectoryError(f"output_dir must be a folder, but {self.output_dir} is a file.")
        self.save_strategy = IntervalStrategy(strategy)
        self.save_steps = save_steps
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.model_card_args = model_card_args
        self._api = _client(hub_token)
        self.hub_model_id = _create_repo(self._api, hub_model_id or self.output_dir.resolve().name)
        self._url = f"{self._api.endpoint}/{self.hub_model_id}"
        self.output_dir.mkdir(parents=True, exist_ok=True)
        _warn_of_new_files(self)
        self.training_history: list[Row] = []
        self.last_job: concurrent.futures.Future[Any] | None = None
        self._batches = (0, 0)  # done before this epoch, and in it
        # At the end of each epoch: a fingerprint of the weights, and how many epochs trained them.
        self._states: dict[int, tuple[float, int]] = {}
        self._trained: int | None = None  # epochs, with those of earlier fits
        self._card_commit: str | None = None  # the newest commit of this run that had the card
        self._card_metadata: dict[str, Any] = {}  # what others added to the card's
        self._has_warned_of_card = False

    def _implements_train_batch_hooks(self) -> bool:
        return self.save_strategy == IntervalStrategy.STEPS

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts history and counts anew, and refuses a model that could not be saved."""
        self.training_history, self._batches, self._states = [], (0, 0), {}
        self._trained = _epochs_trained.get(self.model)
        _check_serialisable(self.model)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves when `save_steps` more batches are done."""
        before, now = self._batches
        # Keras 3 reports the last, shorter execution of several steps as if it were a full one.
        self._batches = before, min(batch + 1, self._fit_argument("steps") or batch + 1)
        every = self.save_steps if self.save_strategy == IntervalStrategy.STEPS else None
        if every and sum(self._batches) // every > (before + now) // every:
            self._save_and_push(f"Training in progress, step {sum(self._batches)}")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Records the logs and, with "epoch", saves."""
        self._batches = sum(self._batches), 0
        row = _numbers_in(logs or {})
        self.training_history.append(row)
        earlier = {done: r for done, r in _history.get(self.model, {}).items() if done < epoch}
        _history[self.model] = earlier | {epoch: row}
        self._trained = (epoch if self._trained is None else self._trained) + 1
        _epochs_trained[self.model] = self._trained
        self._states[epoch] = _fingerprint(self.model), self._trained
        if self.save_strategy == IntervalStrategy.EPOCH:
            message = f"Training in progress, epoch {epoch}"
            self._save_and_push(message, with_checkpoint=self.checkpoint)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Saves the final state, pushes it and waits until it is on the Hub."""
        self._save_and_push("End of training", final=True)

    def _save_and_push(
        self, message: str, with_checkpoint: bool = False, final: bool = False
    ) -> None:
        """Stages a save, publishes it in `output_dir` and hands it to an upload if none runs.

        Every process of a distributed training stages, since saving and reading metrics can be
        collective; the chief alone publishes and pushes.
        """
        is_chief = _is_chief(self.model)
        save = self._stage_and_publish(with_checkpoint, is_chief)
        running = _uploads.get(self.hub_model_id)
        is_busy = running is not None and not running.future.done()
        if not is_chief or (is_busy and not final):
            save.close()
            return
        upload = _Upload(self, save, message, final)
        if not final:
            upload.start()
            return
        upload.say(f"Pushing {self.output_dir} to {self._url}")
        try:
            if running is not None:
                running.stop_retrying.set()
                concurrent.futures.wait([running.future])
            upload.start()
            concurrent.futures.wait([upload.future])
        finally:
            upload.report()

    def _stage_and_publish(self, with_checkpoint: bool, is_chief: bool) -> _Save:
        """Returns the save, or raises a RuntimeError that names what could not be written."""
        part, save = "a private folder", None
        try:
            save = _Save(self.output_dir if is_chief else None)
            part = "the model"
            _check_free_space(self.model, with_checkpoint, save.folder)
            _write_model(self.model, save.folder)
            if self.tokenizer is not None:
                part = "the tokenizer"
                write = getattr(self.tokenizer, "save_pretrained", None)
                (write or self.tokenizer.save_to_preset)(str(save.folder))
            if with_checkpoint:
                part = "the checkpoint"
                _write_checkpoint(self.model, _history[self.model], save.folder)
            _write_card(self, save.folder)
            part = "the files"
            if is_chief:
                save.publish(self.output_dir, stale=not self.checkpoint)
            return save
        except BaseException as error:
            if save is not None:
                save.close()
            if not isinstance(error, Exception):  # let Ctrl-C through
                raise
            hint = _rescue_weights(self.model, self.output_dir) if is_chief else ""
            raise RuntimeError(
                f"Could not write {part} to {self.output_dir}: {type(error).__name__}: {error}. "
                f"Every file there is still whole.{hint}"
            ) from error


def load_repo_checkpoint(
    model: Any, repo_path_or_name: str | Path, token: str | None = None
) -> dict[str, Any]:
    """Restores weights and optimizers that PushToHubCallback saved with `checkpoint=True`.

    The model must have its weights, and be compiled with the optimizer it was trained with. Nothing
    executable is loaded, and nothing is assigned unless the whole checkpoint fits. Variables are
    matched by name where names are unique and the same in model and checkpoint, else by position.

    ```python
    last = load_repo_checkpoint(model, "user/digits")
    model.fit(train_dataset, initial_epoch=last["epoch"] + 1, epochs=20, callbacks=[push_to_hub])
    ```

    Args:
        model: The Keras model to restore.
        repo_path_or_name: A folder, such as `output_dir`, or "owner/name" of a repository on the
            Hub, whose newest revision is taken.
        token: The token to read the repository with. Defaults to the stored one.

    Returns:
        `{"epoch": N}`, the epoch that was finished last, counted from 0.

    Raises:
        FileNotFoundError: There is no such folder, no checkpoint in it, or only a stale one.
        ValueError: The checkpoint is damaged or belongs to another model or optimizer.
        huggingface_hub.utils.HfHubHTTPError: The Hub refuses.
        ConnectionError: The Hub cannot be reached.
    """
    folder = Path(repo_path_or_name).expanduser()
    if not folder.is_dir():
        if not isinstance(repo_path_or_name, str):
            raise FileNotFoundError(f"{folder} is not a folder.")
        folder = _download_checkpoint(repo_path_or_name, token)
    _history[model] = _read_checkpoint(model, folder / CHECKPOINT)
    epoch = max(_history[model])
    _epochs_trained[model] = epoch + 1
    return {"epoch": epoch}


# Kept outside the models, whose attributes might be saved with them; resumed training goes on here.
_history: weakref.WeakKeyDictionary[Any, dict[int, Row]] = weakref.WeakKeyDictionary()  # by epoch
_epochs_trained: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


# Label columns, and what the model takes ----------------------------------------------------------


def _is_positive_integer(value: Any) -> bool:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_integer and bool(value > 0)


def _takes_pair(metric_fn: Any) -> bool:
    """Returns whether `metric_fn` takes one pair rather than predictions and labels."""
    if not callable(metric_fn):
        raise TypeError(f"metric_fn must be callable, but received {metric_fn!r}.")
    try:
        signature = inspect.signature(metric_fn)
    except ValueError:  # some functions written in C have none
        return False
    parameters = signature.parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    takes_labels = len(positional) > 1 and positional[1].name == "labels"
    is_pair = len(required or positional) == 1 and not takes_labels
    try:
        signature.bind(*[None] * (1 if is_pair else 2))
    except TypeError:
        raise TypeError(
            "metric_fn must take predictions and labels, or one argument that holds both, "
            f"but received a function with the signature {signature}."
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
        if not _is_positive_integer(batch_size):
            raise ValueError(
                "batch_size must be a positive integer when eval_dataset is not a "
                f"tf.data.Dataset, but received batch_size={batch_size!r}."
            )
        data = tf.data.Dataset.from_tensor_slices(_as_slices(data)).batch(batch_size)
    size, spec = int(data.cardinality()), data.element_spec
    if size == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "eval_dataset must be finite, but it repeats for ever; remove repeat() or add take()."
        )
    if size == 0:
        raise ValueError("eval_dataset must give at least one batch, but it is empty.")
    if isinstance(spec, tuple) and len(spec) > 3:
        raise ValueError(
            "eval_dataset must give inputs, (inputs, labels) or (inputs, labels, sample_weight), "
            f"but its elements have {len(spec)} parts: {spec}."
        )
    return data


def _as_slices(data: Any) -> Any:
    """Returns the same nesting with tuples for lists of arrays, which tf.data would stack."""
    if isinstance(data, Mapping):
        return {name: _as_slices(column) for name, column in data.items()}
    is_list_of_arrays = isinstance(data, list) and any(len(getattr(p, "shape", ())) for p in data)
    return tuple(map(_as_slices, data)) if isinstance(data, tuple) or is_list_of_arrays else data


def _split(element: Any) -> tuple[Any, Any]:
    """Returns the inputs and the labels (or None) of an element, or of the `element_spec`."""
    inputs, labels = (*element, None)[:2] if isinstance(element, tuple) else (element, None)
    is_spec_of_none = isinstance(labels, tf.TypeSpec) and not hasattr(labels, "shape")
    return inputs, None if is_spec_of_none else labels


def _find_label_columns(spec: Any, wanted: str | list[str] | None) -> list[str] | None:
    """Returns the names of the label columns; None for labels that are not chosen by name.

    `spec` is the data set's `element_spec`, `wanted` what the user gave, None to find them.
    """
    inputs, labels = _split(spec)
    names: list[str] | None = None
    columns = [name for part in (labels, inputs) if isinstance(part, Mapping) for name in part]
    if wanted is not None:
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if not set(names).issubset(columns):
            raise ValueError(
                "label_cols must name columns of eval_dataset, which has "
                f"{sorted(set(columns)) or 'no named columns'}, but received {names}."
            )
    elif isinstance(spec, Mapping):
        guesses = [["labels"], ["start_positions", "end_positions"]]
        names = next((guess for guess in guesses if spec.keys() >= set(guess)), None)
        if names is None:
            raise ValueError(
                "No label column could be found in eval_dataset; set label_cols to one or more of "
                f"its columns, which are {sorted(spec)}, or label_cols=[] if it has no labels."
            )
        logger.warning(
            "label_cols was not set: taking %s of eval_dataset as the labels.", " and ".join(names)
        )
    _check_batched(_labels_of(spec, names))
    return names


def _check_batched(labels: Any) -> None:
    if any(getattr(getattr(leaf, "shape", None), "rank", 1) == 0 for leaf in tf.nest.flatten(labels)):
        raise ValueError(
            "eval_dataset must be batched, but its labels are single values, of shape (); "
            "add .batch(batch_size)."
        )


def _labels_of(element: Any, label_cols: list[str] | None) -> Any:
    """Returns the labels of an element: one column bare, several in a dict, None for none."""
    inputs, labels = _split(element)
    if label_cols is None and not isinstance(labels, Mapping):
        return labels
    parts = [part for part in (inputs, labels) if isinstance(part, Mapping)]
    columns = {name: part[name] for part in parts for name in part}  # the labels' take precedence
    chosen = {name: columns[name] for name in (labels if label_cols is None else label_cols)}
    return next(iter(chosen.values())) if len(chosen) == 1 else chosen or None


def _choose_columns(model: Any, element: Any) -> Any:
    """Returns the element with those of its input columns that the model takes.

    All of them, as in `fit`, except for two kinds of model. Those of transformers take columns by
    name. A functional one in Keras 3 matches the sorted columns to its inputs by position, and would
    take a label column of the right shape for an input.
    """
    if _customises_predict(model):
        return element
    inputs, labels = _split(element)
    if _is_transformers(model):
        takes = inspect.signature(model.call).parameters
        if isinstance(inputs, Mapping):
            inputs = {name: inputs[name] for name in takes if name in inputs}
        # An encoder-decoder that is given labels but no decoder inputs makes these from the labels.
        answer = labels.get("labels") if isinstance(labels, Mapping) else labels
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        named = inputs if isinstance(inputs, Mapping) else dict(zip(takes, parts))
        if answer is not None and {"labels", "decoder_input_ids"} <= takes.keys() - named.keys():
            inputs = {**named, "labels": answer}
    elif _is_functional(model) and isinstance(inputs, Mapping):
        symbolic = getattr(model, "input", None)  # a tensor, or a nesting of them
        names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
        names = list(symbolic) if isinstance(symbolic, Mapping) else names
        if names and inputs.keys() >= set(names):  # else Keras says which are missing
            inputs = {name: inputs[name] for name in names}
    return (inputs, *element[1:]) if isinstance(element, tuple) else inputs


def _select_outputs(model: Any, outputs: Any, output_cols: list[str] | None) -> Any:
    """Returns the outputs to keep: one bare, several in a dict, all if they have no names."""
    if not isinstance(outputs, Mapping) and not output_cols:
        return outputs
    names = list(outputs) if isinstance(outputs, Mapping) else []
    if not set(output_cols or []).issubset(names):
        raise ValueError(
            f"output_cols must name outputs of {type(model).__name__}, which are "
            f"{names or 'not named'}, but received {output_cols}."
        )
    config = getattr(model, "config", None)
    ignored = ["loss", *(getattr(config, "keys_to_ignore_at_inference", None) or [])]
    given = [name for name in names if outputs[name] is not None]
    chosen = output_cols or [name for name in given if name not in ignored] or given
    return outputs[chosen[0]] if len(chosen) == 1 else {name: outputs[name] for name in chosen}


# What kind of model it is -------------------------------------------------------------------------


def _keras_of(model: Any) -> Any:
    """Returns the Keras package that the model's class comes from: `keras` or `tf_keras`."""
    roots = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    return sys.modules[next((root for root in roots if root in ("keras", "tf_keras")), "keras")]


def _is_tensorflow(model: Any) -> bool:
    """Returns whether TensorFlow computes the model, rather than another backend of Keras 3."""
    return bool(_keras_of(model).backend.backend() == "tensorflow")


def _is_transformers(model: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__)


def _is_functional(model: Any) -> bool:
    """Returns whether the model's `call` is that of Keras' functional or sequential models."""
    call = type(model).call
    is_own = call.__module__.partition(".")[0] in ("keras", "tf_keras")
    return is_own and call.__qualname__ in ("Functional.call", "Sequential.call")


def _customises_predict(model: Any) -> bool:
    """Returns whether a model changes anything that Keras lets it change of `predict`."""
    names = ("predict", "predict_step", "predict_on_batch", "make_predict_function")
    modules = {getattr(getattr(model, name), "__module__", "") for name in names}
    return not {module.partition(".")[0] for module in modules} <= {"keras", "tf_keras"}


def _variables_in(model: Any) -> list[Any]:
    """Returns the model's variables, none where it is not built."""
    try:
        return list(model.variables)
    except ValueError:  # tf_keras
        return []


def _strategy_of(model: Any) -> Any:
    """Returns the tf.distribute.Strategy that the model was created under."""
    return getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()


def _library_of(model: Any) -> str:
    """Returns the library to save and load a model with, as the Hub names it."""
    if _is_transformers(model):
        return "transformers"
    if hasattr(model, "save_to_preset"):
        return "keras-hub"
    saves_folders = "zipped" in inspect.signature(_keras_of(model).saving.save_model).parameters
    return "keras" if saves_folders else "tf-keras"


def _is_dense(inputs: Any) -> bool:
    """Returns whether all inputs are present, and none is sparse or ragged."""
    return all(isinstance(leaf, tf.Tensor) for leaf in tf.nest.flatten(inputs))


def _to_backend(inputs: Any) -> Any:
    """Returns the arrays that JAX and PyTorch take; text stays a tf.Tensor."""
    return tf.nest.map_structure(
        lambda x: x if x is None or x.dtype == tf.string else x.numpy(), inputs
    )


# Generation ---------------------------------------------------------------------------------------


GENERATED = """
    sequences sequences_scores scores logits beam_indices attentions hidden_states encoder_attentions
    encoder_hidden_states decoder_attentions decoder_hidden_states cross_attentions past_key_values
""".split()


def _check_generation(metric: KerasMetricCallback) -> None:
    """Refuses a model, or inputs, that `generate` cannot start from."""
    model, inputs = metric.model, _split(metric.eval_dataset.element_spec)[0]
    name, main = type(model).__name__, _main_input(model)
    if not hasattr(model, "generate"):
        raise ValueError(
            f"predict_with_generate=True needs a model with a method generate, but received a {name}."
        )
    if main is None:
        if metric.use_xla_generation:
            logger.warning(
                "use_xla_generation has no effect on %s, which compiles generate itself; "
                "compile(jit_compile=True) is the switch there.",
                name,
            )
        return
    if isinstance(inputs, Mapping) and main not in inputs:
        raise ValueError(
            f"predict_with_generate=True needs the column {main!r} in eval_dataset, "
            f"but received {sorted(inputs)}."
        )
    takes = list(inspect.signature(model.call).parameters)
    if isinstance(inputs, tuple) and (len(inputs) > len(takes) or takes[0] != main):
        raise ValueError(
            f"predict_with_generate=True takes several inputs by the names {takes} of {name}.call, "
            f"but received a tuple of {len(inputs)}; give them as a dict."
        )
    unknown = sorted(set(metric.output_cols or []) - set(GENERATED))
    if unknown and _generation_setting(metric, "return_dict_in_generate"):
        raise ValueError(
            f"output_cols must name what generate returns, which is among {GENERATED}, "
            f"but received {unknown}."
        )


def _main_input(model: Any) -> str | None:
    """Returns the column that generation starts from; None for models that take the batch."""
    if not _is_transformers(model):
        return None
    encoder = getattr(model, "encoder", None)  # whose inputs an encoder-decoder starts from
    return str(getattr(encoder, "main_input_name", model.main_input_name))


def _question(
    model: Any, main: str | None, element: Any, label_cols: list[str] | None
) -> tuple[Any, dict[str, Any]]:
    """Returns what `generate` starts from and, by name, what accompanies it, without any answer.

    The answer is the label columns and what repeats their values: in models of transformers any
    column but the main input, in others the column that is called like the label.
    """
    inputs, labels = _split(element)
    named = labels if isinstance(labels, Mapping) else {}
    hidden = {"labels", *(set(label_cols or []) - named.keys())}
    if main is None:
        question = inputs
        if isinstance(inputs, Mapping):
            given = {name: inputs[name] for name in inputs if name not in hidden}
            copies = {name for name in given if _is_answer(name, given[name], [named.get(name)])}
            question = {name: given[name] for name in given if name not in copies} or given
            if hasattr(model, "preprocessor") and list(question) == ["encoder_text"]:
                question = question["encoder_text"]  # KerasHub takes the dict with decoder_text only
        return question if _is_tensorflow(model) else _to_backend(question), {}
    takes = inspect.signature(model.call).parameters
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(takes, inputs)) if isinstance(inputs, tuple) else {main: inputs}
    answers = tf.nest.flatten(_labels_of(element, label_cols))
    others = {n: inputs[n] for n in takes if n in inputs and n not in (main, "labels")}
    copies = {  # a class label, of rank 1, may equal an input by chance
        name
        for name, column in others.items()
        if column.shape.rank > 1 and _is_answer(name, column, answers)
    }
    # The answer's mask goes too, and any other column with a value for each of its tokens.
    shapes = [others[name].shape for name in copies if others[name].shape != inputs[main].shape]
    return inputs[main], {
        name: column
        for name, column in others.items()
        if name not in hidden | copies and column.shape not in shapes
        if not name.startswith("decoder_")
    }


def _is_answer(name: str, column: Any, answers: list[Any]) -> bool:
    """Returns whether a column that is no mask repeats one of the answers, apart from padding."""
    for answer in answers:
        are_dense = isinstance(column, tf.Tensor) and isinstance(answer, tf.Tensor)
        if are_dense and column.shape == answer.shape and "mask" not in name:
            is_label = answer.numpy() != PADDING
            if is_label.any() and (column.numpy() == answer.numpy())[is_label].all():
                return True
    return False


class _XlaGenerate:
    """Compiles `generate` with XLA, once for each width of the inputs.

    A smaller batch, such as the last, would cost a compilation of its own (2 s for a small T5). It is
    filled up to the largest batch of its width so far by repeating its last row; the surplus rows
    are dropped.
    """

    def __init__(self, generate: Callable[..., Any]) -> None:
        # Tracing a small T5 takes 9 s with AutoGraph and 0.7 s without. GPT2 and Whisper, where
        # Python's `if` and `while` decide on tensors, need it and fail at once without.
        self.compiled = tf.function(generate, jit_compile=True, autograph=False)
        self.with_autograph = tf.function(generate, jit_compile=True, autograph=True)
        self.largest: dict[Any, int] = {}  # batch so far, by the shape of an example

    def __call__(self, main: Any, **others: Any) -> Any:
        size, width = int(main.shape[0]), tuple(main.shape[1:])
        full = self.largest[width] = max(self.largest.get(width, 0), size)
        if size < full:
            rows = np.minimum(np.arange(full), size - 1)  # the last one repeated
            main = tf.gather(main, rows)
            others = {name: tf.gather(part, rows) for name, part in others.items()}
        try:
            generated = self.compiled(main, **others)
        except TypeError:
            self.compiled = self.with_autograph
            generated = self.compiled(main, **others)
        if size == full:
            return generated
        # (full * sequences per example, ...): generate may return several for each example
        return tf.nest.map_structure(lambda x: x[: x.shape[0] * size // full], generated)


def _generation_setting(metric: KerasMetricCallback, name: str) -> Any:
    """Returns a setting of generation from where `generate` takes it, None if nothing sets it."""
    given, model = metric.generate_kwargs, metric.model
    configs = [getattr(model, config, None) for config in ("generation_config", "config")]
    if given.get("generation_config") is not None:  # it takes the place of the model's own
        configs = [given["generation_config"]]
    values = [given.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def _settings_text(metric: KerasMetricCallback) -> str:
    """Returns all settings of generation as one string, to detect changes."""
    if not metric.predict_with_generate:
        return ""

    def plain(value: Any) -> Any:
        value = value.to_dict() if hasattr(value, "to_dict") else value
        if isinstance(value, Mapping):
            return [(repr(name), plain(part)) for name, part in value.items()]
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return np.asarray(value).tolist() if hasattr(value, "__array__") else repr(value)

    return repr(plain([metric.generate_kwargs, getattr(metric.model, "generation_config", None)]))


def _pad_token(metric: KerasMetricCallback) -> int:
    """Returns the token that pads generated sequences: pad, else end token, else -100."""
    for name in ("pad_token_id", "eos_token_id"):
        token = _generation_setting(metric, name)
        if token is not None:
            return int(np.atleast_1d(token)[0])  # there may be several end tokens
    return PADDING


# Padded concatenation, and what metric_fn makes of it ---------------------------------------------


def _to_numpy(batch: Any) -> Any:
    """Returns the batch with arrays for tensors, in plain dicts and tuples, without its Nones."""
    if isinstance(batch, tf.Tensor):
        return batch.numpy()
    if isinstance(batch, Mapping):
        return {name: _to_numpy(part) for name, part in batch.items() if part is not None}
    if isinstance(batch, (list, tuple)) and not (batch and isinstance(batch[0], (str, bytes))):
        return tuple(_to_numpy(part) for part in batch if part is not None)
    if isinstance(batch, tf.RaggedTensor):
        rows = [_to_numpy(row)[None] for row in batch]  # (1, length, ...) each
        return _concatenate(rows) if rows else batch.to_tensor().numpy()
    if isinstance(batch, tf.SparseTensor):
        return tf.sparse.to_dense(batch).numpy()
    return None if batch is None else np.asarray(batch)


def _concatenate(batches: list[Any], token: int = PADDING) -> Any:
    """Concatenates batches on axis 0 and pads every other axis at its end to the longest.

    The peak of memory is the result plus one batch: `batches` is taken apart from its end, so that
    each batch is freed as soon as it is copied.

    Args:
        batches: Arrays of shapes (examples, ...), all of one rank, where a scalar counts as one
            example; or dicts or tuples of them, all alike.
        token: Pads bare integers, and those in a column "sequences". All other numbers are padded with
            -100, text with the empty string.

    Returns:
        The same nesting of new arrays of shape (all examples, longest, ...): float32 for half
        precision, objects for text, else the batches' own dtype, or one wide enough for the padding.
    """
    first = batches[0]
    if any(type(batch) is not type(first) for batch in batches):
        kinds = sorted({type(batch).__name__ for batch in batches})
        raise ValueError(f"All batches must have the same structure, but received {kinds}.")
    if first is None:
        return None
    if isinstance(first, dict):
        columns = [sorted(batch) for batch in batches]
        if odd := [names for names in columns if names != columns[0]]:
            raise ValueError(
                f"All batches must have the same columns, but received {columns[0]} and {odd[0]}."
            )
        tokens = {name: token if name == "sequences" else PADDING for name in first}
        return {n: _concatenate([batch.pop(n) for batch in batches], tokens[n]) for n in tokens}
    if isinstance(first, tuple):
        parts = [list(batch) for batch in batches]
        batches.clear()
        longest = max(map(len, parts))
        for part in parts:  # the scores of a generation that ended early have fewer steps
            missing = tf.nest.map_structure(lambda x: np.full_like(x, PADDING), part[-1:])
            part += missing * (longest - len(part))
        last_first = [_concatenate([part.pop() for part in parts]) for _ in range(longest)]
        return tuple(reversed(last_first))
    batches[:] = map(np.atleast_1d, batches)
    ranks = sorted({array.ndim for array in batches})
    if len(ranks) > 1:
        raise ValueError(f"All batches must have the same number of axes, but received {ranks}.")
    longest_axes = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in batches)))
    dtype, padding = _joined_dtype(batches, token)
    joined = np.empty((sum(map(len, batches)), *longest_axes), dtype)
    end = len(joined)  # joined: (all examples, longest, ...)
    while batches:
        array = batches.pop()
        block = joined[end - len(array) : end]
        if array.shape != block.shape:
            block[...] = padding
        inside = tuple(map(slice, array.shape))
        block[inside] = np.frompyfunc(_as_str, 1, 1)(array) if padding == "" else array
        end -= len(array)
    return joined


def _joined_dtype(arrays: list[Array], token: int) -> tuple[np.dtype[Any], int | str]:
    """Returns the dtype that holds all arrays and their padding, if they need any; and the padding."""
    dtypes = {array.dtype for array in arrays}
    dtype: np.dtype[Any] = functools.reduce(np.promote_types, dtypes)
    if dtype.kind in "OSU":  # text; or integers beyond 64 bits, of ragged rows
        firsts = [array.flat[0] for array in arrays if array.size]
        are_numbers = bool(firsts) and isinstance(firsts[0], (int, np.integer))
        return np.dtype(object), token if are_numbers else ""
    if dtype in (np.float16, tf.bfloat16.as_numpy_dtype):
        return np.dtype(np.float32), PADDING
    padding = token if dtype.kind in "iu" else PADDING
    if len({array.shape[1:] for array in arrays}) > 1:
        dtype = np.promote_types(dtype, np.min_scalar_type(padding))
    if dtype.kind == "f" and all(each.kind in "iu" for each in dtypes):
        # NumPy promotes uint64 and a signed type to float64, which would lose digits.
        fits = all(array.max(initial=0) < 2**63 for array in arrays)
        dtype = np.dtype(np.int64 if fits else object)
    return dtype, padding


def _as_str(text: Any) -> Any:
    """Returns str for UTF-8, and anything else as it is."""
    try:
        return text.decode()
    except (AttributeError, UnicodeDecodeError):
        return text


def _check_metrics(result: Any) -> dict[str, int | float]:
    """Returns what `metric_fn` returned with plain Python numbers."""
    expected = "metric_fn must return a dict of metric names to numbers, but returned"
    if not isinstance(result, Mapping):
        raise TypeError(f"{expected} {result!r}.")
    metrics = _numbers_in(result)
    for name, value in result.items():
        if name not in metrics:
            raise TypeError(f"{expected} {value!r} for {name!r}.")
    return metrics


def _numbers_in(logs: Mapping[Any, Any]) -> Row:
    """Returns the entries that are numbers by name, as plain Python numbers."""
    numbers = {name: _plain_number(value) for name, value in logs.items() if isinstance(name, str)}
    return {name: number for name, number in numbers.items() if number is not None}


def _plain_number(value: Any) -> int | float | None:
    """Returns a Python number for a number, a NumPy scalar or a 0-d array or tensor, else None."""
    try:
        value = value.numpy() if tf.is_tensor(value) else value
        if np.ndim(value) > 0 or np.ma.is_masked(value):
            return None
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, (str, bytes)):
            return None
        as_float = float(number)  # of whatever type, such as Fraction
        return number if isinstance(number, (int, float)) else as_float
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


# Saving -------------------------------------------------------------------------------------------


def _is_chief(model: Any) -> bool:
    """Returns whether this process is the one that publishes and pushes."""
    if _keras_of(model).backend.backend() == "jax":
        return bool(sys.modules["jax"].process_index() == 0)
    return bool(_strategy_of(model).extended.should_checkpoint)


class _Save:
    """A private folder in which a save is staged, and from which it is published and uploaded.

    The lock beside it is released when the process ends, at the latest. The next save removes
    folders whose lock nobody holds: killed runs left them. A worker that publishes nothing uses the
    temporary folder.
    """

    def __init__(self, output_dir: Path | None) -> None:
        entries = list(output_dir.iterdir()) if output_dir else []  # raises if it is gone
        for lock in (path for path in entries if path.match(f"{PRIVATE}*.lock")):
            # A lock that is held raises Timeout, an OSError: that save is in use.
            with contextlib.suppress(OSError, NotImplementedError), filelock.FileLock(lock, timeout=0):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                for part in lock.parent.rglob(f"{lock.stem}.*.part"):
                    part.unlink()
                lock.unlink(missing_ok=True)
        self.root = (output_dir or Path(tempfile.gettempdir())) / f"{PRIVATE}{uuid.uuid4().hex}"
        self.lock = filelock.FileLock(f"{self.root}.lock", thread_local=False)
        with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks
            self.lock.acquire(timeout=0)
        self.folder = self.root / "files"
        self.folder.mkdir(parents=True)
        self.written: set[str] = set()  # the names of the files that are not the user's

    def publish(self, output_dir: Path, stale: bool) -> None:
        """Copies all files into `output_dir`, where each replaces its predecessor atomically.

        With `stale`, a checkpoint of an earlier run there is marked as older than the model now.
        """
        names = self.names()
        self.written = set(names)
        parts = {}  # the copies, each beside its target, which may be on another disk
        try:
            for number, name in enumerate(names):
                target = output_dir / name
                if target.is_dir():
                    raise IsADirectoryError(f"{target} is a folder where the save has a file")
                target.parent.mkdir(parents=True, exist_ok=True)
                parts[target] = target.with_name(f"{self.root.name}.{number}.part")
                shutil.copyfile(self.folder / name, parts[target])
            for target, part in parts.items():
                os.replace(part, target)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        if stale and (output_dir / CHECKPOINT).exists():
            os.replace(output_dir / CHECKPOINT, output_dir / STALE_CHECKPOINT)

    def add(self, output_dir: Path, names: list[str]) -> None:
        """Copies files of the user's, who may be writing to them, or may have removed them."""
        for name in names:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(output_dir / name, self.folder / name)

    def names(self) -> list[str]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.lock.release()
            if not self.root.exists():  # else the next save tries again
                os.unlink(self.lock.lock_file)


def _write_model(model: Any, folder: Path) -> None:
    library = _library_of(model)
    if library == "transformers":
        model.save_pretrained(str(folder))
    elif library == "keras-hub":
        model.save_to_preset(str(folder))
    elif library == "keras":  # what load_model("hf://owner/name") reads
        _keras_of(model).saving.save_model(model, str(folder), zipped=False)
    else:
        # The format is given, since tf_keras defaults to HDF5 in threads other than the main one.
        model.save(str(folder / "model.keras"), save_format="keras_v3")


def _check_serialisable(model: Any) -> None:
    """Refuses a model whose configuration cannot be saved; an unbuilt one cannot be checked yet."""
    library = _library_of(model)
    try:
        if library == "transformers" and model.can_generate():  # temperature without sampling, ...
            with tempfile.TemporaryDirectory() as folder:
                model.generation_config.save_pretrained(folder)
        elif library in ("keras", "tf-keras") and model.built:
            json.dumps(_keras_of(model).saving.serialize_keras_object(model))
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} could not be saved after training: "
            f"{type(error).__name__}: {error}. Often a get_config is missing."
        ) from error


def _check_free_space(model: Any, with_checkpoint: bool, folder: Path) -> None:
    """Raises an OSError where the variables cannot fit: HDF5 crashes the process on a full disk."""
    groups = _variables_of(model) if _variables_in(model) else {"model": []}
    everything = [variable for group in groups.values() for variable in group]
    is_keras = _library_of(model) in ("keras", "tf-keras")  # which writes the optimizer too
    size = 2**20  # bytes, for everything that is no variable
    for variable in (everything if is_keras else groups["model"]) + everything * with_checkpoint:
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # it has no single shape
            size += 2 * math.prod(variable.shape) * tf.as_dtype(variable.dtype).size  # and its copy
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f"No space left on the disk: {size} bytes needed, {free} free")


def _rescue_weights(model: Any, output_dir: Path) -> str:
    """Writes the weights alone where a model cannot be saved; returns what to tell the user."""
    path = output_dir / RESCUED
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        np.savez(path, *model.get_weights())
    except Exception:
        with contextlib.suppress(OSError):
            path.unlink()
        return ""
    return f" The trained weights are in {path}: model.set_weights(list(numpy.load(...).values()))."


# Checkpoint ---------------------------------------------------------------------------------------


def _optimizers_of(model: Any) -> dict[str, Any]:
    """Returns all optimizers that a model, or a model in it, holds: bare, in lists or in dicts."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(name: str, value: Any) -> None:
        parts: Any = ()
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            parts = value.items()
        elif isinstance(value, (list, tuple)):
            parts = enumerate(value)
        elif hasattr(value, "apply_gradients"):
            found[name] = value
        elif isinstance(value, _keras_of(model).Model):
            parts = [("optimizer", getattr(value, "optimizer", None))]
            # The public attributes first: Keras keeps some of them again in private ones.
            parts += sorted(vars(value).items(), key=lambda item: item[0].startswith("_"))
        for key, part in parts:
            if not str(key).startswith("_self_"):  # TensorFlow's own
                visit(f"{name}.{key}" if name else str(key), part)

    visit("", model)
    return found


def _variables_of(model: Any) -> dict[str, list[Any]]:
    """Returns the variables of a checkpoint in their order: the model's, and each optimizer's.

    tf_keras lists the vocabularies of layers among them; those cannot be assigned and are left out.
    """
    groups = {"model": [v for v in model.variables if hasattr(v, "assign")]}
    for name, optimizer in _optimizers_of(model).items():
        state = optimizer.variables
        groups[name] = list(state() if callable(state) else state)  # a method in legacy optimizers
        rate = getattr(optimizer, "learning_rate", None)
        if hasattr(rate, "assign") and not any(rate is variable for variable in groups[name]):
            groups[name].append(rate)  # tf_keras does not count it among the variables
    return groups


def _value_of(variable: Any) -> Array:
    """Returns the value of a variable of any backend, replicated or not."""
    return np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)


def _names_of(group: str, variables: list[Any]) -> list[str]:
    """Returns the names of variables, without that of an optimizer: adam may be adam_1 next time."""
    names = [str(getattr(variable, "path", variable.name)) for variable in variables]
    return names if group == "model" else [name.partition("/")[2] or name for name in names]


def _trained_by(optimizer: Any, variables: list[Any]) -> list[int] | None:
    """Returns which of the variables an optimizer was built for, or None if it does not say."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scale
    index = getattr(optimizer, "_index_dict", None)  # of tf_keras
    if index is not None:
        order = {index.get(optimizer._var_key(v)): n for n, v in enumerate(variables)}
        return [order[place] for place in range(len(index)) if place in order]
    held = getattr(optimizer, "_trainable_variables", None)  # of Keras 3
    places = {id(variable): n for n, variable in enumerate(variables)}
    return None if held is None else [places[id(v)] for v in held if id(v) in places]


def _write_checkpoint(model: Any, rows: dict[int, Row], folder: Path) -> None:
    """Writes all variables, the logs, and what the variables are, into one archive.

    It is NumPy's own format (https://numpy.org/doc/stable/reference/generated/numpy.savez.html),
    written one variable at a time so that memory holds no second copy of the model. Keras'
    `save_weights` would leave out legacy optimizers, such as AdamWeightDecay of transformers.
    """
    groups = _variables_of(model)
    state = {
        "history": rows,
        "names": {group: _names_of(group, variables) for group, variables in groups.items()},
        "optimizers": {
            name: {"class": type(each).__name__, "trains": _trained_by(each, groups["model"])}
            for name, each in _optimizers_of(model).items()
        },
    }
    (folder / CHECKPOINT).parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / CHECKPOINT, "w") as archive:
        archive.writestr("state.json", json.dumps(state, indent=1))
        for group, variables in groups.items():
            for n, variable in enumerate(variables):
                with archive.open(f"{group}.{n}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, _value_of(variable), allow_pickle=False)


def _download_checkpoint(name: str, token: str | None) -> Path:
    """Returns a folder with the newest checkpoint of a repository on the Hub, if there is one."""
    try:
        hub_utils.validate_repo_id(name)
    except hub_utils.HFValidationError:
        raise FileNotFoundError(f"{name} is neither a folder nor the name of a repository.") from None
    api = _client(token)
    download = functools.partial(api.snapshot_download, name, allow_patterns=[CHECKPOINT])
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        folder = Path(download(local_files_only=True))
        logger.warning("huggingface_hub is offline: taking the cached revision %s.", folder.name)
        return folder

    def download_newest() -> Path:
        newest = api.model_info(name).sha
        folder = Path(download())  # without an answer it would take an older one from its cache
        if folder.name != newest:
            raise ConnectionError(f"the newest revision, {newest}, could not be downloaded")
        return folder

    return Path(_reach(api, download_newest))


ADVICE = " If an optimizer does not fit, run one training step first, then load: that builds it."


def _read_checkpoint(model: Any, file: Path) -> dict[int, Row]:
    """Restores the model from what _write_checkpoint wrote and returns the logs by epoch.

    Everything is read and compared before the first variable is assigned.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected {file}, which is there after an epoch with checkpoint=True. A stale "
            f"checkpoint, older than the model beside it, is not loaded: that is {STALE_CHECKPOINT}, "
            "left by a later run without checkpoint=True."
        )
    if not _variables_in(model):
        raise ValueError("The model must be built before a checkpoint is loaded; call it once.")
    arrays, rows, names, saved = _open_checkpoint(file)
    optimizers = _optimizers_of(model)
    compiled = {name: type(each).__name__ for name, each in optimizers.items()}
    if (needed := {name: kind for name, (kind, _) in saved.items()}) != compiled:
        raise ValueError(
            f"The checkpoint needs the optimizers {needed or None}, "
            f"but received {compiled or None}.{ADVICE}"
        )
    groups = _variables_of(model)
    sources: dict[str, list[str]] = {}  # the keys of the arrays, for the variables of each group
    for group in ("model", *optimizers):
        stored = names.get(group, [])
        if group in optimizers and len(groups[group]) < len(stored):
            weights = dict(zip(sources["model"], groups["model"]))
            _build_optimizer(model, optimizers[group], saved[group][1], weights)
            groups = _variables_of(model)
        here = _names_of(group, groups[group])
        is_by_name = len(set(here)) == len(here) and sorted(stored) == sorted(here)
        order = map(stored.index, here) if is_by_name else range(len(here))
        sources[group] = [f"{group}.{n}" for n in order]
        for variable, key in zip(groups[group], sources[group]):
            value, array = _value_of(variable), arrays.get(key)
            if array is not None and array.dtype == f"V{value.dtype.itemsize}":
                arrays[key] = array = array.view(value.dtype)  # NumPy stores bfloat16 as bare bytes
            expected = (value.shape, value.dtype)
            received = None if array is None else (array.shape, array.dtype)
            if expected != received:
                raise ValueError(
                    f"The checkpoint does not fit the model: expected {expected} for {key}, "
                    f"but received {received}.{ADVICE if group != 'model' else ''}"
                )
    if extra := arrays.keys() - set(itertools.chain(*sources.values())):
        raise ValueError(
            f"The checkpoint does not fit the model, which lacks {sorted(extra)}.{ADVICE}"
        )
    for group, variables in groups.items():
        for variable, key in zip(variables, sources[group]):
            variable.assign(arrays[key])
    return rows


def _open_checkpoint(file: Path) -> tuple[dict[str, Array], dict[int, Row], Any, Any]:
    """Returns arrays, logs, the variables' names, and the optimizers' classes with what they train."""
    damages = (ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError)
    try:  # running out of memory, or lacking permission, does not mean damage
        # NumPy does not close a file that it opened and could not read.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        state = json.loads(arrays.pop("state.json"))
        rows = {int(epoch): _numbers_in(row) for epoch, row in state["history"].items()}
        names = {group: list(map(str, each)) for group, each in state["names"].items()}
        saved = {n: (each["class"], each["trains"]) for n, each in state["optimizers"].items()}
        if min(rows) < 0:
            raise ValueError(f"history begins with epoch {min(rows)}")
    except (*damages, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"The checkpoint is damaged: {file} does not hold what checkpoint=True writes there: "
            f"{type(error).__name__}: {error}."
        ) from error
    return arrays, rows, names, saved


def _build_optimizer(model: Any, optimizer: Any, places: Any, weights: dict[str, Any]) -> None:
    """Builds an optimizer for those of the weights, by key, that it trained when it was saved."""
    variables = model.trainable_variables
    if isinstance(places, list):
        keys = [f"model.{place}" for place in places]
        variables = [weights[key] for key in keys if key in weights]
    if not _is_tensorflow(model):  # Keras pairs gradients by position there, in the model's order
        order = {id(variable): n for n, variable in enumerate(model.trainable_variables)}
        variables = sorted(variables, key=lambda variable: order.get(id(variable), len(order)))
    build = getattr(optimizer, "build", None) or optimizer._create_all_weights  # of legacy ones
    with _strategy_of(model).scope():
        build(variables)


# Hub sync -----------------------------------------------------------------------------------------

# The newest upload to each repository, of whichever callback, for as long as it lives.
_uploads: weakref.WeakValueDictionary[str, _Upload] = weakref.WeakValueDictionary()
_clock = types.SimpleNamespace(now=time.monotonic, wait=threading.Event.wait)  # for tests


class _PushError(RuntimeError):
    """A push that would fail again in the same way."""


class _Upload:
    """One save on its way to the Hub, attempted until it is committed, refused or abandoned.

    What huggingface_hub itself retries depends on its version: at most some LFS transfers and the
    requests around them, never the commit. Here the whole sequence starts again; what the Hub has
    received by then is not sent twice.
    """

    def __init__(self, push: PushToHubCallback, save: _Save, message: str, final: bool) -> None:
        self.push, self.save, self.message, self.final = push, save, message, final
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()  # of a CommitInfo
        self.future.set_running_or_notify_cancel()  # so that nobody can cancel it
        self.stop_retrying = threading.Event()
        self.with_card = True

    def start(self) -> None:
        """Starts the thread; if that fails, the upload counts as failed."""
        _uploads[self.push.hub_model_id] = self
        self.push.last_job = self.future
        # Not a daemon: the interpreter waits at its exit for the upload that runs.
        thread = threading.Thread(target=_fulfil, args=(self.future, self.run))
        try:
            thread.start()
        except BaseException as error:
            if thread.ident is None:  # it does not run
                self.end(error)
                self.future.set_exception(error)
            if not isinstance(error, Exception):  # let Ctrl-C through
                raise

    def run(self) -> Any:
        """Adds the user's files and attempts the commit; returns its CommitInfo."""
        push = self.push
        try:
            names, _ = _user_files(push.output_dir, push.checkpoint, warn=self.final)
            self.save.add(push.output_dir, sorted({*names} - self.save.written))
            with _quiet_client(self.final and bool(push._fit_argument("verbose"))):
                seconds = FINAL_SECONDS if self.final else BACKGROUND_SECONDS
                commit = _attempt(
                    self.commit_in_time, seconds, self.stop_retrying, at_exit=self.final
                )
        except BaseException as error:
            self.end(error)
            raise
        self.end()
        return commit

    def end(self, error: BaseException | None = None) -> None:
        """Removes the private folder, and logs a failure unless the final push reports or follows."""
        self.save.close()
        if error is not None and not self.final and not self.stop_retrying.is_set():
            logger.warning(
                '"%s" was not pushed to %s: %s. It is complete in %s; the next save is pushed.',
                *(self.message, self.push._url, _describe(error), self.push.output_dir),
            )

    def say(self, text: str) -> None:
        """Prints where `fit` prints, with escapes for what the terminal cannot show."""
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        if self.push._fit_argument("verbose"):
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                print(text.encode(encoding, "backslashreplace").decode(encoding))

    def report(self) -> None:
        """Says how the upload of the final state ended, or that it was interrupted."""
        push, reason = self.push, "waiting for it was interrupted"
        if self.future.done():
            error = self.future.exception()
            if error is None:
                self.say(f"Pushed: {self.future.result().commit_url}")
                return
            reason = _describe(error)
        elif push.last_job is self.future:
            self.stop_retrying.set()
        else:
            self.save.close()
        login = "" if huggingface_hub.get_token() else "with HF_TOKEN set to your token, "
        logger.error(
            "The final state could not be pushed to %s: %s. It is complete in %s; %spush it with:\n%s",
            *(push._url, reason, push.output_dir, login, _upload_command(push)),
        )

    def commit_in_time(self) -> Any:
        """Returns the CommitInfo of one attempt, or raises TimeoutError when it takes too long.

        huggingface_hub may wait for an answer for ever. The thread can be abandoned, since it is a
        daemon; should it wake up later, its commit is refused once a newer one is there.
        """
        sizes = ((self.save.folder / name).stat().st_size for name in self.save.names())
        seconds = ATTEMPT_SECONDS + sum(sizes) / SLOWEST_LINK
        try:
            return _within(seconds, self.commit)
        except Exception as error:
            is_invalid = isinstance(error, (ValueError, Warning)) or _status_of(error) in (400, 422)
            if not self.with_card or _is_transient(error) or not is_invalid:
                raise
            logger.warning("Pushing without the model card: %s", _describe(error))
        self.with_card = False  # was it the card that the Hub refused?
        return _within(seconds, self.commit)

    def commit(self) -> Any:
        """Commits the save on top of the newest commit of the repository."""
        push, api, repo_id = self.push, self.push._api, self.push.hub_model_id
        head = api.model_info(repo_id)
        on_hub = {file.rfilename for file in head.siblings or []}
        names = self.save.names()
        if removed := sorted(self.save.written - {*names}):
            raise _PushError(f"{removed} were removed during the upload")
        if CARD in on_hub and CARD in names and head.sha != push._card_commit:
            theirs = api.hf_hub_download(repo_id, CARD, revision=head.sha, local_dir=self.save.root)
            self.with_card = self.with_card and _adapt_card(push, theirs, self.save.folder / CARD)
        names = [name for name in names if name != CARD or self.with_card]
        add = huggingface_hub.CommitOperationAdd
        operations: list[Any] = [add(name, str(self.save.folder / name)) for name in names]
        if not threading.main_thread().is_alive():
            # The client's threads cannot start when the interpreter exits; files go one by one.
            for operation in operations:
                api.preupload_lfs_files(repo_id, [operation])
        if CHECKPOINT in on_hub and not push.checkpoint:  # it is stale now
            operations.append(huggingface_hub.CommitOperationDelete(CHECKPOINT))
        commit = api.create_commit(
            repo_id, operations, commit_message=self.message, parent_commit=head.sha
        )
        if ".gitignore" in on_hub:
            siblings = api.model_info(repo_id, revision=commit.oid).siblings or []
            own = self.save.written & {*names}
            if missing := sorted(own - {file.rfilename for file in siblings}):
                raise _PushError(f".gitignore on the Hub keeps {missing} away")
        push._card_commit = commit.oid if CARD in names else None
        return commit


def _client(token: str | None) -> Any:
    """Returns huggingface_hub's client; a token that was read from a file may end in a line break."""
    return huggingface_hub.HfApi(token=(token or "").strip() or None)


def _create_repo(api: Any, name: str) -> str:
    """Creates the repository unless it exists, and returns its full name."""
    repo_id = str(_reach(api, lambda: api.create_repo(name, exist_ok=True)).repo_id)
    try:
        # create_repo accepts a repository that exists, whoever owns it. The request before an
        # upload checks the right to write, and leaves no commit.
        probe = huggingface_hub.CommitOperationAdd(CARD, b"-")
        api.preupload_lfs_files(repo_id, [probe])
    except Exception as error:
        if _status_of(error) in (401, 403):
            raise
    return repo_id


def _warn_of_new_files(push: PushToHubCallback) -> None:
    """Warns of files of the user's that are not on the Hub yet and will be pushed."""
    names, _ = _user_files(push.output_dir, checkpoint=False)
    if not names:
        return
    with contextlib.suppress(Exception):
        siblings = push._api.model_info(push.hub_model_id).siblings or []
        names = [name for name in names if name not in {file.rfilename for file in siblings}]
    if names:
        logger.warning(
            "Files in %s that will be pushed to %s with each save: %d, such as %s.",
            *(push.output_dir, push._url, len(names)),
            ", ".join(names[:5]) + ", ..." * (len(names) > 5),
        )


def _reach(api: Any, request: Callable[[], Any]) -> Any:
    """Returns what a request returns, attempted again for some seconds; an error names the Hub."""
    try:
        return _attempt(request, CREATION_SECONDS)
    except Exception as error:
        is_answer = isinstance(error, (hub_utils.HfHubHTTPError, ValueError))
        if is_answer or _status_of(error) is not None:
            raise
        raise ConnectionError(f"{api.endpoint} could not be reached: {_describe(error)}") from error


def _attempt(
    action: Callable[[], Any],
    seconds: float,
    stop: threading.Event | None = None,
    at_exit: bool = True,
) -> Any:
    """Returns what `action` returns; attempted again for `seconds` from its first failure on.

    Waits double up to LONGEST_WAIT, and the last attempt is made at the limit. A Retry-After takes
    precedence. There is no wait for a further attempt once `stop` is set, nor, without `at_exit`,
    while the interpreter waits to exit.
    """
    stop = stop or threading.Event()
    main = threading.main_thread()
    deadline, wait = math.inf, FIRST_WAIT
    while True:
        was_alive = main.is_alive()
        try:
            return action()
        except Exception as error:
            if was_alive and not main.is_alive() and not stop.is_set():
                continue  # files that could not be sent by threads any more are sent one by one
            deadline = min(deadline, _clock.now() + seconds)
            left, asked = deadline - _clock.now(), _retry_after(error)
            if not _is_transient(error) or left <= 0 or (asked or 0) > left:
                raise
            pause = min(asked or min(wait * random.uniform(1, 1.5), LONGEST_WAIT), left)
            until = _clock.now() + pause
            while not (is_over := stop.is_set() or not (at_exit or main.is_alive())):
                if _clock.now() >= until:
                    break
                _clock.wait(stop, min(1.0, until - _clock.now()))
            if is_over:
                raise
            wait *= 2


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """Returns what `action` returns; TimeoutError after so many seconds."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    threading.Thread(target=_fulfil, args=(outcome, action), daemon=True).start()
    if not concurrent.futures.wait([outcome], seconds).done:
        raise TimeoutError(
            f"the Hub has not answered within {seconds:.0f} seconds, or it has limited the rate "
            "(429) and huggingface_hub waits for longer"
        )
    return outcome.result()


def _fulfil(future: concurrent.futures.Future[Any], action: Callable[[], Any]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, what caused it, what caused that, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _response_of(error: BaseException) -> Any:
    """Returns the Hub's response to what failed, or None; of an LFS upload it is in a cause."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response for response in responses if response is not None), None)


def _status_of(error: BaseException) -> int | None:
    return getattr(_response_of(error), "status_code", None)


def _is_transient(error: BaseException) -> bool:
    """Returns whether another attempt may succeed, as after connection errors and timeouts."""
    status = _status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 423, 425, 429)
    final = (AttributeError, LookupError, TypeError, ValueError, Warning, _PushError)
    return isinstance(error, OSError) or not isinstance(error, final)


def _retry_after(error: BaseException) -> float | None:
    """Returns the seconds that the Hub asks to wait, given as in RFC 9110, section 10.2.3."""
    value = getattr(_response_of(error), "headers", {}).get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _describe(error: BaseException) -> str:
    """Returns the error and its root cause, in one line."""
    links = list(_causes(error))
    texts = [f"{type(link).__name__}: {link}" for link in [links[0], *links[1:][-1:]]]
    return " ".join(" because of ".join(texts).split())


@contextlib.contextmanager
def _quiet_client(shows_bars: bool) -> Iterator[None]:
    """Keeps huggingface_hub from drawing bars into Keras' own, unless the environment decides.

    It also silences the warning of a commit without changes, which is normal when training ends.
    """
    client = logging.getLogger("huggingface_hub.hf_api")

    def is_of_use(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files have been modified")

    is_decided = huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    hides = not (shows_bars or is_decided or hub_utils.are_progress_bars_disabled())
    client.addFilter(is_of_use)
    if hides:
        hub_utils.disable_progress_bars()
    try:
        yield
    finally:
        client.removeFilter(is_of_use)
        if hides:
            hub_utils.enable_progress_bars()


def _user_files(folder: Path, checkpoint: bool, warn: bool = False) -> tuple[list[str], list[str]]:
    """Returns the files in a folder that may be pushed, and patterns for the others.

    Without `checkpoint`, a checkpoint found there is stale and is not pushed. Links to files are
    followed and links to folders are not, as `upload_folder` does. Files whose names are not UTF-8
    cannot be pushed.
    """
    patterns = [form for name in NEVER_PUSHED for form in (name, f"*/{name}")]
    patterns += [STALE_CHECKPOINT, RESCUED, *([] if checkpoint else [CHECKPOINT])]
    allowed: list[str] = []
    others: list[str] = []
    for parent, folders, files in os.walk(folder):
        here, subfolders = Path(parent).relative_to(folder), set(folders)
        paths = {(here / name).as_posix(): name for name in [*folders, *files]}
        named = set(hub_utils.filter_repo_objects(paths, ignore_patterns=patterns, key=str.lower))
        kept = {path for path in named if path == path.encode("utf-8", "replace").decode()}
        if warn and kept != named:
            logger.warning("%s are not pushed: names that are not UTF-8.", sorted(named - kept))
        folders.clear()
        for path, name in paths.items():
            if path not in kept:
                others.append(glob.escape(path) + "/*" * (name in subfolders))
            elif name in subfolders:
                folders.append(name)
            elif (folder / path).is_file():
                allowed.append(path)
    return sorted(allowed), sorted(others)


def _upload_command(push: PushToHubCallback) -> str:
    """Returns the command of the installed huggingface_hub that pushes the same files."""
    folder = push.output_dir
    patterns = [shlex.quote(pattern) for pattern in _user_files(folder, push.checkpoint)[1]]
    if importlib.util.find_spec("huggingface_hub.commands") and patterns:
        patterns = [" ".join(patterns)]  # until version 1.0 one option takes them all
    exclude = "".join(f" --exclude {pattern}" for pattern in patterns)
    program = "hf" if importlib.util.find_spec("huggingface_hub.cli") else "huggingface-cli"
    repo_id = shlex.quote(push.hub_model_id)
    return f"{program} upload {repo_id} {shlex.quote(str(folder))} .{exclude}"


# Model card ---------------------------------------------------------------------------------------

CARD_ARGS = "dataset dataset_args dataset_tags finetuned_from language license tags tasks".split()
CARD_MARKS = (  # what a generated card says: ours, and that of transformers
    "<!-- Generated by keras_callbacks.",
    "generated automatically according to the information Keras had access to",
)
METRIC_WORDS = {  # a word of a metric's name, and what the Hub calls such metrics
    **{name: name for name in "accuracy f1 precision recall mse mae bleu sacrebleu wer cer".split()},
    **{f"rouge{kind}": "rouge" for kind in ("", "1", "2", "l", "lsum")},
    **{"acc": "accuracy", "auc": "roc_auc", "perplexity": "perplexity"},
}  # https://huggingface.co/metrics
CARD_TEMPLATE = """---
{metadata}
---

<!-- Generated by keras_callbacks. Complete the card, then remove this comment: the card is yours \
from then on. -->

# {name}

{summary}

{results}

## Description, intended uses, limitations, data

More information needed: only the author of this model can tell.

## How to load it

```python
{code}
```

## Hyperparameters

- precision: {precision}
- epochs: {epochs} of {steps} steps
- distribution: {strategy}, {replicas} replicas in sync
- optimizer:

```json
{optimizer}
```

## Results by epoch

{table}

## Framework versions

{versions}
"""


def _write_card(push: PushToHubCallback, folder: Path) -> None:
    """Writes the card beside the model staged in a folder, unless a human has taken it over.

    A failure here does not stop the weights.
    """
    card = folder / CARD
    try:
        card.write_text(_model_card(push, folder), "utf-8", errors="replace")
        existing = push.output_dir / CARD
        if existing.exists() and not _adapt_card(push, existing, card):
            card.unlink()
    except Exception as error:
        card.unlink(missing_ok=True)
        logger.warning("No model card was written: %s: %s", type(error).__name__, error)


def _adapt_card(push: PushToHubCallback, existing: str | Path, card: Path) -> bool:
    """Adds to our card the metadata of the existing one that ours lacks, unless that is a human's.

    A card of metadata alone was written by a human or the website, so what it says takes precedence.
    Returns whether the card may take the place of the existing one.
    """
    text = Path(existing).read_text("utf-8", errors="replace")
    metadata = r"\A\s*---\n.*?^---[ \t]*(\n|\Z)"
    body = re.sub(metadata, "", text, flags=re.DOTALL | re.MULTILINE).strip()
    if body and not any(mark in body for mark in CARD_MARKS):
        if not push._has_warned_of_card:
            logger.warning("%s has a model card by a human: it stays as it is.", push._url)
        push._has_warned_of_card = True
        return False
    if CARD_MARKS[0] in card.read_text("utf-8", errors="replace"):  # else it is a human's, too
        theirs: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # YAML that somebody has broken
            theirs = huggingface_hub.metadata_load(existing) or {}
        ours = huggingface_hub.metadata_load(card) or {}
        skipped = {*ours, "model-index", "metrics"} if body else set()
        push._card_metadata |= {key: theirs[key] for key in theirs if key not in skipped}
        huggingface_hub.metadata_save(card, {**ours, **push._card_metadata})
    return True


def _fingerprint(model: Any) -> float:
    """Returns a checksum of the small trainable variables, which tells weights of epochs apart.

    NaN, which equals nothing, if this process cannot read the values.
    """
    variables = sorted(model.trainable_variables, key=lambda variable: math.prod(variable.shape))
    small = [v for v in variables if math.prod(v.shape) <= 2**16] or variables[:1]
    try:
        return functools.reduce(lambda crc, v: zlib.crc32(_value_of(v).tobytes(), crc), small, 0)
    except RuntimeError:
        return math.nan


def _model_card(push: PushToHubCallback, folder: Path) -> str:
    """Returns the text of the card for the model that is staged in a folder."""
    model, facts, strategy = push.model, push.model_card_args, _strategy_of(push.model)
    rows = _history.get(model, {})
    now = _fingerprint(model)
    # Another callback may have put back the weights of an earlier epoch, or averaged them. The
    # EarlyStopping of Keras 2.15 does so before the last epoch's end is seen here: the first counts.
    same = [(done, count) for done, (state, count) in push._states.items() if state == now]
    epoch, trained = same[0] if same else (-1, 0)
    row = rows.get(epoch, {})
    base = str(facts.get("finetuned_from") or "")
    guess = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    if not base and not Path(guess).exists():  # "" is the working folder
        base = guess
    data = " and ".join(map(_as_text, _names_in(facts.get("dataset"))))
    summary = f"A {type(model).__name__}"
    summary += f", fine-tuned from {_as_text(base)}" if base else ""
    summary += f", trained on {data}" if data else ""
    summary += f". After {trained} epochs:" if trained else "."
    policy = getattr(model, "dtype_policy", None) or _keras_of(model).mixed_precision.global_policy()
    optimizers = {
        name: {"class_name": type(each).__name__, **each.get_config()}
        for name, each in _optimizers_of(model).items()
    }
    only = optimizers if len(optimizers) > 1 else next(iter(optimizers.values()), None)
    columns = list(dict.fromkeys(name for logs in rows.values() for name in logs))  # as they came
    lines = [["Epoch", *map(_title, columns)], ["---:"] * (1 + len(columns))]
    for done, logs in sorted(rows.items()):
        lines.append([str(done), *(f"{logs[n]:.4g}" if n in logs else "" for n in columns)])
    versions = "keras tf_keras keras_hub transformers tensorflow jax torch numpy huggingface_hub"
    loaded = {name: getattr(sys.modules.get(name), "__version__", "") for name in versions.split()}
    return CARD_TEMPLATE.format(
        metadata=_metadata(push, base, row).to_yaml(),
        name=_as_text(push.hub_model_id.split("/")[-1]),
        summary=summary,
        results="\n".join(f"- {_title(name)}: {value:.4g}" for name, value in row.items())
        or "The results of exactly these weights are not known.",
        code=_loading_code(push, folder),
        precision=getattr(policy, "name", policy),
        epochs=push._fit_argument("epochs") or "unknown",
        steps=push._fit_argument("steps") or "an unknown number of",
        strategy=type(strategy).__name__,
        replicas=strategy.num_replicas_in_sync,
        optimizer=json.dumps(
            only, indent=2, default=lambda x: str(x) if (n := _plain_number(x)) is None else n
        ),
        table="\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        versions="\n".join(f"- {name} {version}" for name, version in loaded.items() if version),
    )


def _metadata(push: PushToHubCallback, base: str, row: Row) -> huggingface_hub.ModelCardData:
    """Returns the metadata of the card; `row` holds the results of the weights that are pushed."""
    facts = push.model_card_args
    keys = ("language", "license", "tags", "tasks", "dataset", "dataset_tags", "dataset_args")
    language, licenses, tags, tasks, datasets, ids, configs = (_names_in(facts.get(k)) for k in keys)
    own = {"loss", "lr", "learning_rate", "val_loss"}
    with contextlib.suppress(ValueError):  # outside `fit` they may have no result yet
        own |= set(push.model.get_metrics_result())
    validation = {
        " ".join(name.split()): value
        for name, value in row.items()
        if name not in own and math.isfinite(value)
    }
    results = [
        huggingface_hub.EvalResult(
            task_type=task,
            dataset_type=tag or dataset,
            dataset_name=dataset or tag,
            dataset_config=config,
            metric_type=_metric_type(name),
            metric_name=name,
            metric_value=value,
        )
        for task in tasks
        for dataset, tag, config in itertools.zip_longest(datasets, ids, configs)
        if dataset or tag
        for name, value in validation.items()
    ]
    is_repository = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base)
    return huggingface_hub.ModelCardData(
        language=language or None,
        license=next(iter(licenses), None),
        library_name=_library_of(push.model),
        tags=[*tags, "generated_from_keras_callback"],
        base_model=base if is_repository else None,
        datasets=ids or None,
        pipeline_tag=tasks[0] if len(tasks) == 1 else None,
        metrics=sorted({_metric_type(name) for name in validation}) or None,
        model_name=push.hub_model_id.split("/")[-1],
        eval_results=results or None,
    )


def _names_in(value: Any) -> list[str]:
    """Returns one-line names, for a name, a data set of the datasets library, or several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    names = (getattr(item, "builder_name", None) or item for item in values)
    return [" ".join(str(name).split()) for name in names if isinstance(name, (str, int, float))]


def _metric_type(name: str) -> str:
    """Returns the Hub's name for a metric, or its own where the Hub has none."""
    own = name.removeprefix("val_")
    return next((METRIC_WORDS[word] for word in own.lower().split("_") if word in METRIC_WORDS), own)


def _as_text(text: Any) -> str:
    """Returns text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]|#~<>&])", r"\\\1", " ".join(str(text).split()))


def _title(name: str) -> str:
    return _as_text(f"Validation {name[4:]}" if name.startswith("val_") else name)


def _loading_code(push: PushToHubCallback, folder: Path) -> str:
    """Returns the Python that loads the model from the Hub, and a transformers tokenizer.

    `your_code` stands for the module that defines the user's own classes and functions.
    """
    model, repo_id, library = push.model, push.hub_model_id, _library_of(push.model)
    keras, name = _keras_of(model), type(model).__name__
    home = type(model).__module__.partition(".")[0]
    own = {name: name} if home not in ("transformers", "keras_hub", "keras", "tf_keras") else {}
    options = ""
    if library in ("keras", "tf-keras"):
        if library == "keras":
            text = (folder / "config.json").read_text("utf-8")
        else:
            with zipfile.ZipFile(folder / "model.keras") as archive:
                text = archive.read("config.json").decode()
        own = _custom_objects(keras, text)
        pairs = ", ".join(f'"{key}": {value}' for key, value in own.items())
        options = f", custom_objects={{{pairs}}}" if own else ""
        has_lambda = '"__lambda__"' in text or '"function_type": "lambda"' in text
        options += ", safe_mode=False" if has_lambda else ""
    imports = f"from your_code import {', '.join(own.values())}\n" if own else ""
    if library == "transformers":
        tokens = [type(push.tokenizer).__name__] if push.tokenizer is not None else []
        if names := [*([] if own else [name]), *tokens]:
            imports = f"from transformers import {', '.join(names)}\n{imports}"
        imports += "".join(f'tokenizer = {each}.from_pretrained("{repo_id}")\n' for each in tokens)
        return f'{imports}model = {name}.from_pretrained("{repo_id}")'
    if library == "keras-hub":
        loader = name if own else f"keras_hub.models.{name}"
        return f'import keras_hub\n{imports}\nmodel = {loader}.from_preset("hf://{repo_id}")'
    if library == "keras":
        return f'import keras\n{imports}\nmodel = keras.saving.load_model("hf://{repo_id}"{options})'
    return f"""import huggingface_hub, {keras.__name__}
{imports}path = huggingface_hub.hf_hub_download("{repo_id}", "model.keras")
model = {keras.__name__}.models.load_model(path{options})"""


def _custom_objects(keras: Any, config: str) -> dict[str, str]:
    """Returns the user's own classes and functions in a model's JSON, by the names used there."""
    found = {}

    def collect(part: dict[str, Any]) -> Any:
        name, home = part.get("registered_name"), str(part.get("module")).partition(".")[0]
        if name == "function":
            name, places = part["config"], (keras.losses, keras.metrics, keras.activations)
            home = "keras" if any(hasattr(place, name) for place in places) else ""
        if name and home not in ("keras", "tf_keras"):
            found[name] = name.rpartition(">")[2]
        return part

    json.loads(config, object_hook=collect)
    return dict(sorted(found.items()))
