#!/usr/bin/env bash
# Keras 3.15.0 on TensorFlow 2.21.0, and tf_keras 2.21.0 (Python 3.11).
#
# One would expect: after an epoch of 10 batches `optimizer.iterations` is 10 higher, whether or
# not the data set knows its size.
#
# Behaviour: with a data set of unknown size (after filter(), from a generator) the optimizer of
# Keras 3 counts one update more in each epoch, tf_keras in the first, when the data have run out;
# train_step is not traced for it, but learning rate schedules and Adam's bias correction run ahead.
# Several steps in one execution, and data of known size, count what was trained.
# Output seen and checked here, `iterations` at the end of three epochs of 10 batches:
#> keras: known 10 20 30, unknown 11 22 33, unknown in fours 10 20 30
#> tf_keras: known 10 20 30, unknown 11 21 31
#
# For users: count batches, not `iterations`; end a pipeline in assert_cardinality() if its size is
# known to you.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 numpy==2.4.6
"$work/venv/bin/pip" -qq install --no-deps tf_keras==2.21.0   # it asks for "tensorflow" by name
cat > "$work/see.py" <<'PY'
import importlib
import numpy as np
import tensorflow as tf

x, y = np.ones((20, 4), "float32"), np.zeros(20)
known = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
kinds = {"known": (known, 1), "unknown": (known.filter(lambda *batch: True), 1)}
for name in ("keras", "tf_keras"):
    keras, seen = importlib.import_module(name), []
    if name == "keras":
        kinds["unknown in fours"] = (kinds["unknown"][0], 4)
    else:
        kinds.pop("unknown in fours")
    for kind, (data, steps) in kinds.items():
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3, "softmax")])
        model.compile("adam", "sparse_categorical_crossentropy", steps_per_execution=steps)
        counts = []
        count = lambda epoch, logs: counts.append(str(int(model.optimizer.iterations)))
        model.fit(data, epochs=3, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=count)])
        seen.append(f"{kind} {' '.join(counts)}")
    print(f"{name}: {', '.join(seen)}")
PY
TF_CPP_MIN_LOG_LEVEL=3 "$work/venv/bin/python" -W ignore "$work/see.py" 2>/dev/null | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
