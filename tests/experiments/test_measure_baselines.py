"""experiments/tiny_wan/measure_baselines.py on one scene."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "tiny_wan" / "measure_baselines.py"


def test_it_measures_what_each_baseline_selects(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("measure_baselines", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [("sparse_only", {"topk": 0.03}), ("vsa", {"topk": 0.03}), ("vmoba", {"topk": 0.1})]
    monkeypatch.setattr(module, "ROWS", tuple(rows))
    assert module.main(["--samples", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    found = {
        name: [float(x) for x in values] for name, *_, a, b, c in lines for values in [(a, b, c)]
    }
    assert found["sparse_only"][0] == found["vsa"][0] == 0.969  # 2 of 64 blocks
    assert found["sparse_only"][1] < found["vsa"][1]
    assert found["sparse_only"][2] == found["vsa"][2]  # whose gate starts at zero
    assert 0.9 < found["vmoba"][0] < 0.96
