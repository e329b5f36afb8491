#!/usr/bin/env bash
# Keras 3.15.0 on TensorFlow 2.21.0 and on JAX 0.10.0 (Python 3.11).
#
# One would expect: what a callback sees of a model does not depend on the backend.
#
# Behaviour: a model whose first layer has no input shape yet is built by `fit`
# before `on_train_begin` on JAX, and after it on TensorFlow. A callback that notes
# the weights when training begins measures right on JAX; on TensorFlow it gets an
# empty list, and `zip` with the weights at the end compares nothing, without a
# word. Keras' own BackupAndRestore trains on JAX and raises on TensorFlow.
# Output seen and checked:
#> tensorflow: arrays at the beginning 0, moved: no; BackupAndRestore: ValueError
#> jax: arrays at the beginning 2, moved: yes; BackupAndRestore: trains
#
# For users: give the model an Input, or call it once, before `fit`.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 jax==0.10.0 numpy==2.4.6
cat > "$work/see.py" <<'PY'
import sys
import keras
import numpy as np

x, y, seen = np.ones((8, 4)), np.ones((8, 1)), []

class Distance(keras.callbacks.Callback):
    """How far training moves the weights."""

    def on_train_begin(self, logs=None):
        self.start = self.model.get_weights()

    def on_train_end(self, logs=None):
        pairs = zip(self.start, self.model.get_weights())
        moved = sum(np.abs(before - after).sum() for before, after in pairs)
        seen.append(f"arrays at the beginning {len(self.start)}, moved: {'yes' if moved else 'no'}")

def train(callback):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    try:
        model.fit(x, y, verbose=0, callbacks=[callback])
    except ValueError as error:
        return type(error).__name__
    return "trains"

train(Distance())
backup = train(keras.callbacks.BackupAndRestore(sys.argv[1]))
print(f"{keras.backend.backend()}: {seen[0]}; BackupAndRestore: {backup}")
PY
export TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=-1
for backend in tensorflow jax; do
  KERAS_BACKEND=$backend "$work/venv/bin/python" "$work/see.py" "$work/$backend" 2>"$work/errors" || { cat "$work/errors" >&2; exit 1; }
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
