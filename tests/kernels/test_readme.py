"""The code in the package's README runs, and gives what its comments say."""

import re
from pathlib import Path

import numpy as np
import pytest
from sla2_kernels import kernels

README = Path(__file__).parents[2] / "packages" / "sla2-kernels" / "README.md"


def section(title: str) -> dict:
    """The names that the Python code under this heading leaves behind."""
    text = README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, README.name, "exec"), names)
    return names


def test_on_the_cpu():
    made = section("On the CPU")
    assert made["indices"].shape == (2, 8, 3)
    assert made["indices"].dtype == np.int32
    q, k, v, out, lse = (made[name].astype(float) for name in ("q", "k", "v", "out", "lse"))
    phi_q, phi_k = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (q, k))
    for head, row in ((0, 0), (1, 999)):
        chosen = np.isin(np.arange(1000) // 64, made["indices"][head, row // 128])
        p = np.exp(k[head] @ q[head, row] / 8) * chosen
        linear = phi_k[head] @ phi_q[head, row] * ~chosen
        expected = 0.9 * p @ v[head] / p.sum() + 0.1 * linear @ v[head] / linear.sum()
        np.testing.assert_allclose(out[head, row], expected, atol=1e-5)
        np.testing.assert_allclose(lse[head, row], np.log(p.sum()), atol=1e-5)


def test_on_the_emulator(capsys):
    made = section("On the GPU, and on the emulator")
    scores = made["pooled_q"] @ made["pooled_k"].transpose(0, 2, 1)
    best = np.sort(np.argsort(-scores, axis=-1)[..., :3], axis=-1)
    np.testing.assert_array_equal(made["found"].indices.owner[0], best)
    assert str(made["found"].indices.owner) in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_compiling_ahead_of_time(monkeypatch):
    """Of the kernels those that test_gate.py compiles too; test_compile.py compiles the others."""
    all_specs = kernels.all_specs
    monkeypatch.setattr(
        kernels,
        "all_specs",
        lambda arch: [s for s in all_specs(arch) if "128" in s.label and "bfloat16" in s.label],
    )
    made = section("Compiling ahead of time")
    assert made["spec"].arch == "sm_90a"
    assert made["problems"] == []
