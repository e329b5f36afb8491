#!/usr/bin/env bash
# Keras 3.15.0 and tf_keras 2.21.0, both on TensorFlow 2.21.0 (Python 3.11).
#
# One would expect: layers that carry names get their own weights back from a
# `.weights.h5` file, or loading fails. Keras 3 even writes each layer's name.
#
# Behaviour: within a functional model a weight is found by its layer's class
# and position, and the stored name is not compared. Listing two outputs of
# equal shape in the other order swaps their weights without a word. tf_keras
# accepts `by_name=True` and swaps all the same; it also swaps the attributes of
# a subclassed model, where Keras 3 goes by their names. Output seen and checked:
#> keras: dense is a, outputs [b, a]: a<-b b<-a
#> keras: dense is a, outputs [b, a], by_name=True: ValueError
#> keras: dense is a, attributes set b first: a<-a b<-b
#> tf_keras: dense is unnamed, outputs [b, a]: a<-b b<-a
#> tf_keras: dense is unnamed, outputs [b, a], by_name=True: a<-b b<-a
#> tf_keras: dense is unnamed, attributes set b first: a<-b b<-a
#
# For users: rebuild a model with the very code that saved it, or keep the whole
# model. Who reorders layers compares a prediction before and after loading.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install tensorflow-cpu==2.21.0 keras==3.15.0 numpy==2.4.6 h5py==3.14.0
"$work/venv/bin/pip" -qq install --no-deps tf_keras==2.21.0   # it asks for "tensorflow" by name
cat > "$work/see.py" <<'PY'
import importlib, sys, h5py, numpy as np
lib, path, keras = *sys.argv[1:], importlib.import_module(sys.argv[1])
def functional(names):
    x = keras.Input((3,))
    return keras.Model(x, [keras.layers.Dense(2, name=name)(x) for name in names])
class Pair(keras.Model):
    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, keras.layers.Dense(2, name=name))
        self(np.ones((1, 3)))
    def call(self, x):
        return self.a(x) + self.b(x)
def show(what, make, **options):
    saved, fresh = make("ab"), make("ba")
    saved.save_weights(path)
    try:
        fresh.load_weights(path, **options)
        line = " ".join(f"{n}<-{o}" for n in "ab" for o in "ab" if np.array_equal(
            fresh.get_layer(n).get_weights()[0], saved.get_layer(o).get_weights()[0]))
    except ValueError as error:
        line = type(error).__name__
    print(f"{lib}: dense is {name}, {what}: {line}")
functional("ab").save_weights(path)
name = h5py.File(path)["layers/dense/vars"].attrs.get("name", "unnamed")
show("outputs [b, a]", functional)
show("outputs [b, a], by_name=True", functional, by_name=True)
show("attributes set b first", Pair)
PY
export KERAS_HOME="$work" KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3
for lib in keras tf_keras; do
    "$work/venv/bin/python" "$work/see.py" "$lib" "$work/x.weights.h5" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
