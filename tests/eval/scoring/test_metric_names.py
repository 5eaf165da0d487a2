"""Which metrics a name stands for: groups, modules and installed packages of others, settings on
the command line, and what was meant by a wrong name.
"""

import importlib.metadata
import json

import pytest
from helpers import toy_metric
from sla2_eval.cli.main import main
from sla2_eval.scoring import metrics

LOAD = "def load(name, settings, device):\n    return lambda sample: 0.5\n"


def test_groups_stand_for_their_metrics():
    paired = list(metrics.select(["paired"]))
    assert paired[:3] == ["psnr", "ssim", "ms_ssim"]
    assert all(metrics.specs()[name].kind == "paired" for name in paired)
    alone = metrics.select(["all"], reference=False)
    assert {spec.kind for spec in alone.values()} == {"unpaired"}
    assert "caption_accuracy" not in metrics.select(["all"])  # of the built-in data set
    both = list(metrics.select(["vbench", "psnr"]))
    assert both[0] == "psnr"
    assert "temporal_flickering_static" in both
    with pytest.raises(ValueError, match="reference: expected a folder for the metrics 'paired'"):
        metrics.select(["paired"], reference=False)


def test_wrong_names_are_told_what_is_near():
    with pytest.raises(ValueError, match=r"got 'pnsr'; did you mean 'psnr'\?"):
        metrics.select(["pnsr"])
    with pytest.raises(ValueError, match=r"got 'vbnch'; did you mean 'vbench'\?"):
        metrics.select(["vbnch"])
    with pytest.raises(ValueError, match=r"got 'zzzz'$"):
        metrics.select(["zzzz"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ssim": {"simga": 2.0}}, r"for ssim, got 'simga'; did you mean 'sigma'\?"),
        ({"ssim": {"sigma": "wide"}}, "expected sigma of ssim to be like 1.5, got 'wide'"),
        ({"fvd": {"clip_frames": 16.5}}, "expected clip_frames of fvd to be like 16, got 16.5"),
        ({"fvd": {"clips": "two"}}, "expected clips of fvd to be 'first' or 'all', got 'two'"),
        ({"fvd": {"files": {"i3": "x"}}}, "expected weights among i3d in files of fvd, got 'i3'"),
        ({"fvd": {"files": {"i3d": 3}}}, "expected texts in files of fvd, got 3"),
        ({"fdv": {}}, r"expected names among ssim, fvd, got 'fdv'; did you mean 'fvd'\?"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        metrics.check_settings(settings, metrics.select(["ssim", "fvd"]))


def test_settings_that_fit_pass():
    fitting = {"ssim": {"sigma": 2}, "fvd": {"clips": "all", "files": {"i3d": "x"}}}
    metrics.check_settings(fitting, metrics.select(["ssim", "fvd"]))


def _point(monkeypatch, value: str) -> None:
    point = importlib.metadata.EntryPoint("others", value, metrics.ENTRY_POINTS)
    monkeypatch.setattr(metrics, "_looked", False)
    monkeypatch.setattr(metrics, "_MODULES", list(metrics._MODULES))
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == point.group else []
    )


def test_metrics_of_installed_packages_are_known(tmp_path, monkeypatch):
    toy_metric.register(tmp_path / "hook", LOAD, monkeypatch)
    _point(monkeypatch, "toy_metrics")
    assert metrics.specs()["toy"].title == "Toy"
    assert metrics.registered() == ("toy_metrics",)  # which workers are told
    assert metrics.load("toy", {})(None) == 0.5


def test_a_package_that_cannot_be_imported_ends_nothing(monkeypatch):
    _point(monkeypatch, "nowhere_at_all")
    with pytest.warns(UserWarning, match="others of an unknown package: metrics: expected a modul"):
        assert "psnr" in metrics.specs()


def test_the_command_takes_modules_and_settings(make_folder, tmp_path, monkeypatch, capsys):
    load = "def load(name, settings, device):\n    return lambda sample: settings['gain']\n"
    specs = toy_metric.SPECS.replace("needs_prompt=True", 'settings={"gain": 1.0}')
    toy_metric.register(tmp_path / "hook", load, monkeypatch)
    (tmp_path / "hook" / "toy_metrics.py").write_text(specs + load)
    folder, out = make_folder("a", 1), str(tmp_path / "out")
    command = ["score", "--videos", str(folder), "--metrics", toy_metric.NAME, "--out", out]
    assert main([*command, "--json", "--set", "toy.gain=2.5"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["metric"], row["mean"]) == ("toy", 2.5)
    for text, said in [
        ("toy.gian=1", "did you mean 'gain'?"),
        ("gain=1", "--set: expected METRIC.KEY=VALUE, got 'gain=1'"),
        ("toy.gain=high", "expected gain of toy to be like 1.0, got 'high'"),
    ]:
        assert main([*command, "--set", text]) == 2
        assert said in capsys.readouterr().err


def test_whatever_a_module_raises_is_told_and_a_name_is_the_modules_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metrics, "_MODULES", list(metrics._MODULES))
    (tmp_path / "without_cuda.py").write_text("raise OSError('libcudart.so: not found')\n")
    with pytest.raises(ValueError, match=r"SPECS, got 'without_cuda': libcudart\.so: not found"):
        metrics.register("without_cuda")
    with pytest.raises(ValueError, match=r"expected a metric of helpers\.toys, got 'psnr'"):
        metrics.select(["helpers.toys:psnr"])
