"""experiments/tiny_wan/measure_error.py on two adapters of the tiny model."""

import importlib.util
import json
from pathlib import Path

import pytest
from sla2_eval.generation.sampling import load_generator
from sla2_eval.grid.settings import Attention
from sla2_eval.grid.steps import apply

SCRIPT = Path(__file__).parents[2] / "experiments" / "tiny_wan" / "measure_error.py"


def test_the_error_is_zero_with_every_block_and_not_with_few(capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("measure_error", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = ["--levels", "2", "--scenes", "1", "--out", str(tmp_path / "errors.json")]
    for name, topk in (("every", 1.0), ("few", 0.05)):
        transformer = load_generator("tiny").transformer
        apply(transformer, Attention({"topk": topk, "block_q": 32, "block_k": 16})).save(
            tmp_path / name
        )
        given += ["--adapter", str(tmp_path / name)]
    assert module.main(given) == 0
    found = json.loads((tmp_path / "errors.json").read_text())
    for layer in range(4):
        every, few = (found[name][str(layer)] for name in ("every", "few"))
        assert list(every) == list(few) == ["0.25", "0.75"]
        assert max(every.values()) < 1e-9
        assert min(few.values()) > 0.01
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines[lines.index("few:") :] if line.startswith("| 0 |"))
    values = [float(cell) for cell in first.strip("| ").split("|")[1:]]
    assert values[:2] == pytest.approx(list(found["few"]["0"].values()), abs=5e-4)
    assert values[2] == pytest.approx(sum(values[:2]) / 2, abs=1e-3)
