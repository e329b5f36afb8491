#!/usr/bin/env bash
# Keras 3.15.0 and tf_keras 2.21.0, both on TensorFlow 2.21.0 (Python 3.11).
#
# One would expect: after `load_weights` or `set_weights`, a Normalization layer
# uses the mean and variance it now holds, in `predict` and in a plain call.
#
# Behaviour: the layer computes with constants made from its variables. A model
# that has predicted once keeps those of that moment in its compiled `predict`.
# Loading changes the plain call only, without a word. In Keras 3 `set_weights`
# reaches neither, though the layer holds the new values. (That `adapt` needs a
# new compilation is documented; this is about weights.) Output seen and checked
# here, 1.22 being right and 5.00 the input unchanged:
#> keras: never used, load_weights: mean 3.00, call 1.22, predict 1.22
#> keras: has predicted, load_weights: mean 3.00, call 1.22, predict 5.00
#> keras: never used, set_weights: mean 3.00, call 5.00, predict 5.00
#> tf_keras: never used, load_weights: mean 3.00, call 1.22, predict 1.22
#> tf_keras: has predicted, load_weights: mean 3.00, call 1.22, predict 5.00
#> tf_keras: never used, set_weights: mean 3.00, call 1.22, predict 1.22
#
# For users: load before the first `predict`, `evaluate` or `fit`, or `compile`
# again afterwards. Who restores the best weights within a process, or copies
# them by `set_weights`, must look at such layers separately.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 numpy==2.4.6
"$work/venv/bin/pip" -qq install --no-deps tf_keras==2.21.0   # it asks for "tensorflow" by name
cat > "$work/see.py" <<'PY'
import importlib, sys
import numpy as np
lib, path = sys.argv[1:]
keras = importlib.import_module(lib)
x = np.array([[1.0], [3.0], [5.0]], "float32")

def make():
    return keras.Sequential([keras.Input((1,)), keras.layers.Normalization()])

source = make()
source.layers[-1].adapt(x)
source.save_weights(path)
for before, change in (("never used", "load_weights"), ("has predicted", "load_weights"),
                       ("never used", "set_weights")):
    model = make()
    if before == "has predicted":
        model.predict(x, verbose=0)
    getattr(model, change)(path if change == "load_weights" else source.get_weights())
    mean, call = model.get_weights()[0].item(), np.array(model(x))[-1, 0]
    predict = model.predict(x, verbose=0)[-1, 0]
    print(f"{lib}: {before}, {change}: mean {mean:.2f}, call {call:.2f}, predict {predict:.2f}")
PY
export KERAS_HOME="$work" KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3
for lib in keras tf_keras; do
    "$work/venv/bin/python" "$work/see.py" "$lib" "$work/x.weights.h5" 2>"$work/log" ||
        { cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
