#!/usr/bin/env bash
# tf_keras 2.21.0 on TensorFlow 2.21.0, beside Keras 3.15.0 (Python 3.11).
#
# One would expect: `model.steps_per_execution` is what `compile` was given, for
# as long as the model stays compiled as it is.
#
# Behaviour: in tf_keras it is a tf.Variable, and `fit` works with it. During the
# last execution of each epoch it holds the steps that are left, and after that
# the old value again. With 3 steps per execution and 16 batches a callback reads
# 3, 3, 3, 3, 3 and then 1 in `on_train_batch_end`; in `on_epoch_end` it reads 3.
# Code that asks there whether one step is executed at a time is told "yes" once
# an epoch. In Keras 3 it is a plain integer and stays 3.
# Output seen and checked:
#> keras: int, in batches [3, 3, 3, 3, 3, 3], at the epoch's end 3
#> tf_keras: ResourceVariable, in batches [3, 3, 3, 3, 3, 1], at the epoch's end 3
#
# For users: read it in `on_train_begin` and keep the value.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 numpy==2.4.6
"$work/venv/bin/pip" -qq install --no-deps tf_keras==2.21.0   # it asks for "tensorflow" by name
cat > "$work/see.py" <<'PY'
import importlib, sys
import numpy as np
keras = importlib.import_module(sys.argv[1])

class Read(keras.callbacks.Callback):
    values, last = [], None
    def on_train_batch_end(self, batch, logs=None):
        self.values.append(int(self.model.steps_per_execution))
    def on_epoch_end(self, epoch, logs=None):
        self.last = int(self.model.steps_per_execution)

model = keras.Sequential([keras.layers.Dense(1)])
model.compile("sgd", "mse", steps_per_execution=3)
read, x = Read(), np.ones((16, 1))
model.fit(x, x, batch_size=1, verbose=0, callbacks=[read])
kind = type(model.steps_per_execution).__name__
print(f"{sys.argv[1]}: {kind}, in batches {read.values}, at the epoch's end {read.last}")
PY
export KERAS_HOME="$work" KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3
for lib in keras tf_keras; do
    "$work/venv/bin/python" "$work/see.py" "$lib" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
