#!/usr/bin/env bash
# Keras 3.15.0 and tf_keras 2.21.0, both on TensorFlow 2.21.0 (Python 3.11).
#
# One would expect: `steps_per_execution` is a matter of speed alone. A call
# limited to 10 steps works on 10 batches, whatever is executed at a time.
#
# Behaviour: Keras 3 rounds the limit up to whole executions. With 4 steps per
# execution and a data set that has more to give, `fit(steps_per_epoch=10)`
# trains 12 batches, `predict(steps=10)` returns the rows of 12 batches and
# `evaluate(steps=10)` is the loss over 12. Forty batches, meant for four epochs
# of ten, give three epochs of twelve and one of four (and only then a warning
# that the data ran out). tf_keras keeps to the limit. Output seen and checked:
#> keras: fit [12, 12, 12, 4], batch indices [3, 7, 11]
#> keras: predict 24 rows, evaluate 180.17 (20 rows: 123.50)
#> tf_keras: fit [10, 10, 10, 10], batch indices [3, 7, 9]
#> tf_keras: predict 20 rows, evaluate 123.50 (20 rows: 123.50)
#
# For users: let the steps be a multiple of `steps_per_execution`, or cut the
# data with `Dataset.take`. Learning rate schedules counted in
# steps_per_epoch * epochs end early; a callback cannot take the last batch
# index plus one as the number of steps that were asked for.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 numpy==2.4.6
"$work/venv/bin/pip" -qq install --no-deps tf_keras==2.21.0   # it asks for "tensorflow" by name
cat > "$work/see.py" <<'PY'
import importlib, sys
import numpy as np, tensorflow as tf
keras = importlib.import_module(sys.argv[1])

class Count(keras.callbacks.Callback):
    before, trained, indices = 0, [], []
    def on_train_batch_end(self, batch, logs=None):
        self.indices.append(batch)
    def on_epoch_end(self, epoch, logs=None):
        now = int(self.model.optimizer.iterations)
        self.trained.append(now - self.before)
        self.before = now

model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
model.compile("sgd", "mse", steps_per_execution=4)
x = np.arange(80.0).reshape(40, 2, 1)                  # 40 batches of 2 rows
data = tf.data.Dataset.from_tensor_slices((x, 0 * x))
count = Count()
model.fit(data.map(lambda x, y: (x / 80, y)), steps_per_epoch=10, epochs=4,
          verbose=0, callbacks=[count])
model.set_weights([np.ones((1, 1)), np.zeros(1)])      # answers what it is given
rows = len(model.predict(data, steps=10, verbose=0))
loss = model.evaluate(data, steps=10, verbose=0)
print(f"{sys.argv[1]}: fit {count.trained}, batch indices {count.indices[:3]}")
print(f"{sys.argv[1]}: predict {rows} rows, evaluate {loss:.2f}"
      f" (20 rows: {np.mean(x[:10] ** 2):.2f})")
PY
export KERAS_HOME="$work" KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3
for lib in keras tf_keras; do
    "$work/venv/bin/python" "$work/see.py" "$lib" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
