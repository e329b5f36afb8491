#!/usr/bin/env bash
# h5py 3.16.0 (HDF5 2.0.0) and h5py 3.14.0 (HDF5 1.14.6), NumPy 2.4.6
# (Python 3.11).
#
# One would expect: an assignment to an attribute that raises leaves the old
# value in place, and the well-known limit of 64 KB goes by the size of what is
# written.
#
# Behaviour: the old attribute is deleted before the new one is tried. What is
# refused in Python beforehand (a dict) leaves it; what is refused later takes
# it along: a list that is too large, a text with a NUL, a lone surrogate (as in
# file names that are not UTF-8). And the limit goes by type: one str of ten
# million characters is written, 4,092 names of one character are not, as each
# takes 16 bytes wherever its text lies; a NumPy string of 70,000 bytes is not
# either. Output seen and checked here, the same for both versions:
#> 3.16.0, 3.14.0: a dict: TypeError, then the old value
#> 3.16.0, 3.14.0: str of 10,000,000: written, then the new value
#> 3.16.0, 3.14.0: 4,091 names: written, then the new value
#> 3.16.0, 3.14.0: 4,092 names: OSError, then nothing
#> 3.16.0, 3.14.0: np.bytes_ of 70,000: OSError, then nothing
#> 3.16.0, 3.14.0: text with a NUL: ValueError, then nothing
#> 3.16.0, 3.14.0: name of a file: UnicodeEncodeError, then nothing
#
# For users: who keeps notes in the attributes of a file such as Keras'
# `.weights.h5` writes lists as one JSON text (it escapes NULs and surrogates),
# and never wraps a replacement in try/except as if failing were harmless.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/see.py" <<'PY'
import os, sys
import h5py, numpy as np

cases = {
    "a dict": {"a": 1},
    "str of 10,000,000": "x" * 10_000_000,
    "4,091 names": ["n"] * 4091,
    "4,092 names": ["n"] * 4092,
    "np.bytes_ of 70,000": np.bytes_("x" * 70_000),
    "text with a NUL": "a\0b",
    "name of a file": os.fsdecode(b"caf\xe9.txt"),
}
for what, value in cases.items():
    with h5py.File(sys.argv[1], "w") as file:
        file.attrs["note"] = "old"
        try:
            file.attrs["note"] = value
            result = "written"
        except Exception as error:
            result = type(error).__name__
    with h5py.File(sys.argv[1]) as file:
        note = file.attrs.get("note")
    left = "nothing" if note is None else "the old value" if str(note) == "old" else "the new value"
    print(f"{what}: {result}, then {left}")
PY
for version in 3.16.0 3.14.0; do
    "$work/venv/bin/pip" -qq install h5py==$version numpy==2.4.6
    PYTHONUTF8=1 "$work/venv/bin/python" "$work/see.py" "$work/x.h5" | sed "s/^/$version: /"
done | tee "$work/seen"
for version in 3.16.0 3.14.0; do sed -n "s/^#> 3.16.0, 3.14.0: /$version: /p" "$0"; done | diff - "$work/seen"
