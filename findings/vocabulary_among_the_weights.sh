#!/usr/bin/env bash
# tf_keras 2.21.0 on TensorFlow 2.21.0, beside Keras 3.15.0 (Python 3.11).
#
# One would expect: `model.weights` holds variables, and `get_weights()` arrays,
# on which one can compute: an average over epochs, a norm, a checksum.
#
# Behaviour: in tf_keras a TextVectorization that was adapted puts its vocabulary
# among both: in `weights` an object without name, shape and dtype, in
# `get_weights()` an array of bytes. Loops over either that are right for every
# other model fail, though `count_params()` and `set_weights(get_weights())` do
# not. In Keras 3 both hold the trained arrays alone.
# Output seen and checked:
#> keras: weights Variable Variable Variable; arrays float32 float32 float32
#> keras: shapes (6, 2) (2, 1) (1,); half of each array: yes
#> tf_keras: weights VocabWeightHandler ResourceVariable ResourceVariable ResourceVariable; arrays object float32 float32 float32
#> tf_keras: shapes AttributeError; half of each array: TypeError
#
# For users: take the weights that have an `assign`, or trainable_variables.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 numpy==2.4.6
"$work/venv/bin/pip" -qq install --no-deps tf_keras==2.21.0   # it asks for "tensorflow" by name
cat > "$work/see.py" <<'PY'
import importlib, sys
import numpy as np
name = sys.argv[1]
keras = importlib.import_module(name)

words = keras.layers.TextVectorization()
words.adapt(["red green", "green blue"])
layers = [keras.layers.Embedding(6, 2), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
model = keras.Sequential([keras.layers.Input((1,), dtype="string"), words, *layers])

def attempt(action):
    try:
        return action()
    except (AttributeError, TypeError) as error:
        return type(error).__name__

kinds = " ".join(type(weight).__name__ for weight in model.weights)
dtypes = " ".join(str(np.asarray(array).dtype) for array in model.get_weights())
shapes = attempt(lambda: " ".join(str(tuple(weight.shape)) for weight in model.weights))
halves = attempt(lambda: [array * 0.5 for array in model.get_weights()] and "yes")
model.set_weights(model.get_weights())
print(f"{name}: weights {kinds}; arrays {dtypes}")
print(f"{name}: shapes {shapes}; half of each array: {halves}")
PY
export KERAS_HOME="$work" KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3
for lib in keras tf_keras; do
    "$work/venv/bin/python" "$work/see.py" "$lib" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
