#!/usr/bin/env bash
# huggingface_hub 2.4.0 and 0.36.0, with PyYAML 6.0.4, seqeval 1.2.2, NumPy 2.4.6
# (Python 3.11).
#
# One would expect: a score from a metric library goes into a model card as a
# number, or is refused when the card is made. np.float64 is even a `float`.
#
# Behaviour: `ModelCardData` writes it, silently, as a Python object that
# huggingface_hub's own `ModelCard` and `metadata_load` cannot read back. Of
# seqeval's scores for the same sentences `f1_score` is of that kind, while
# `accuracy_score` is a plain float; `round` does not help, as it returns NumPy's
# type again. Output seen and checked here:
#> 2.4.0: accuracy_score: float, value: 0.6666666666666666, reads back
#> 2.4.0: f1_score: float64, value: !!python/object/apply, ConstructorError
#> 2.4.0: round(f1_score, 4): float64, value: !!python/object/apply, ConstructorError
#> 2.4.0: f1_score.item(): float, value: 0.6666666666666666, reads back
#> 0.36.0: accuracy_score: float, value: 0.6666666666666666, reads back
#> 0.36.0: f1_score: float64, value: !!python/object/apply, ConstructorError
#> 0.36.0: round(f1_score, 4): float64, value: !!python/object/apply, ConstructorError
#> 0.36.0: f1_score.item(): float, value: 0.6666666666666666, reads back
#
# For users: take `.item()` or `float()` of every score before it goes into a
# card, and read a card back before it is pushed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/see.py" <<'PY'
import huggingface_hub, yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from seqeval.metrics import accuracy_score, f1_score

truth, guess = [["B-PER", "O", "B-LOC"]], [["B-PER", "O", "O"]]
f1 = f1_score(truth, guess)
for name, score in {"accuracy_score": accuracy_score(truth, guess), "f1_score": f1,
                    "round(f1_score, 4)": round(f1, 4), "f1_score.item()": f1.item()}.items():
    result = EvalResult(task_type="token-classification", dataset_type="d", dataset_name="d",
                        metric_type="score", metric_value=score)
    text = str(ModelCardData(model_name="m", eval_results=[result]))
    value = next(line.strip() for line in text.splitlines() if " value:" in line)
    value = value.split(":numpy")[0]                   # the rest depends on NumPy's version
    try:
        card = ModelCard(f"---\n{text}\n---\n# m\n")
        fate = "reads back" if card.data.eval_results[0].metric_value == score else "differs"
    except yaml.YAMLError as error:
        fate = type(error).__name__
    print(f"{huggingface_hub.__version__}: {name}: {type(score).__name__}, {value}, {fate}")
PY
for hub in 2.4.0 0.36.0; do
    "$work/venv/bin/pip" -qq install huggingface_hub==$hub pyyaml==6.0.4 \
        seqeval==1.2.2 numpy==2.4.6 scikit-learn==1.9.1
    HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/see.py"
done | tee "$work/seen"
diff <(sed -n 's/^#> //p' "$0") "$work/seen"
