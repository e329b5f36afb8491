#!/usr/bin/env bash
# Keras 3.15.0 and tf_keras 2.21.0, both on TensorFlow 2.21.0 (Python 3.11).
#
# One would expect: a name that training reports can be monitored, and in mode
# "auto" all callbacks agree whether more of it is better.
#
# Behaviour: Keras 3 looks the name up among the metrics as compiled, where the
# output's name is no part of it. With two outputs the reported "val_a_auc" and
# even "val_a_loss" are refused, once the first epoch is over, and the "val_auc"
# it has a direction for is never reported: nothing is stopped or saved, with
# warnings only. tf_keras refuses none, yet EarlyStopping waits for the highest
# AUC while ModelCheckpoint keeps the lowest. Output seen and checked here:
#> keras: outputs a, val_auc, reported: early max, plateau max, checkpoint max
#> keras: outputs ab, val_a_auc, reported: early ValueError, plateau ValueError, checkpoint ValueError
#> keras: outputs ab, val_a_loss, reported: early ValueError, plateau ValueError, checkpoint ValueError
#> keras: outputs ab, val_auc, not reported: early max, plateau max, checkpoint max
#> tf_keras: outputs a, val_auc, reported: early max, plateau min, checkpoint min
#> tf_keras: outputs ab, val_a_auc, reported: early max, plateau min, checkpoint min
#> tf_keras: outputs ab, val_a_loss, reported: early min, plateau min, checkpoint min
#> tf_keras: outputs ab, val_auc, not reported: early max, plateau min, checkpoint min
#
# For users: always pass `mode`, and take the name to monitor from `history`.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 numpy==2.4.6
"$work/venv/bin/pip" -qq install --no-deps tf_keras==2.21.0   # it asks for "tensorflow" by name
cat > "$work/see.py" <<'PY'
import importlib, sys, numpy as np
lib, path, keras = *sys.argv[1:], importlib.import_module(sys.argv[1])
made, x = keras.callbacks, np.ones((4, 1), "float32")
def train(outputs, callback):
    given = keras.Input((1,))
    heads = {n: keras.layers.Dense(1, "sigmoid", name=n)(given) for n in outputs}
    model = keras.Model(given, heads if len(heads) > 1 else heads["a"])
    model.compile("sgd", "mse", metrics={"a": [keras.metrics.AUC(name="auc")]})
    y = {n: x for n in outputs} if len(heads) > 1 else x
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    try:
        model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=[callback])
        return logs, "max" if callback.monitor_op(2.0, 1.0) else "min"
    except ValueError:
        assert model.optimizer.iterations == 1         # trained: one batch, one epoch
        return logs, "ValueError"
cases = ("a", "val_auc"), ("ab", "val_a_auc"), ("ab", "val_a_loss"), ("ab", "val_auc")
for outputs, name in cases:
    found = []
    for what, callback in (("early", made.EarlyStopping(name)),
                           ("plateau", made.ReduceLROnPlateau(name)),
                           ("checkpoint", made.ModelCheckpoint(path, name, save_best_only=True))):
        logs, direction = train(outputs, callback)
        found.append(f"{what} {direction}")
    known = "reported" if name[len("val_"):] in logs else "not reported"
    print(f"{lib}: outputs {outputs}, {name}, {known}: {', '.join(found)}")
PY
export KERAS_HOME="$work" KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3
for lib in keras tf_keras; do
    "$work/venv/bin/python" "$work/see.py" "$lib" "$work/best.keras" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
