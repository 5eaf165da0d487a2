"""sla2 doctor: what is missing is named with the way to get it, what is broken makes the exit code
1.
"""

import json

from sla2_eval.cli import doctor
from sla2_eval.cli.main import main


def test_every_finding_says_what_and_how():
    found = {finding.what: finding for finding in doctor.examine()}
    assert {
        "python",
        "torch",
        "driver",
        "GPU",
        "NVRTC",
        "CuPy",
        "cache folder",
        "backend auto",
    } <= set(found) | {"GPU"}
    assert {found["backend reference"].status, found["backend cpu"].status} == {"works"}
    assert {finding.status for finding in found.values()} <= {"works", "missing", "broken"}
    assert all(
        finding.get
        for finding in found.values()
        if finding.status == "missing" and "backend" not in finding.what
    )


def test_a_missing_package_is_found(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name in ("av", "timm") else real(name)
    )
    found = {finding.what: finding for finding in doctor._packages()}
    assert (found["av"].status, found["timm"].status) == ("broken", "missing")
    assert found["timm"].get == "pip install 'sla2-eval[metrics]'"
    assert found["torch"].status == "works"


def test_a_wrong_backend_is_broken(monkeypatch):
    from sla2_core import functional

    real = functional.block_sparse_attention

    def wrong(q, k, v, blocks, backend):
        out, lse = real(q, k, v, blocks, backend=backend)
        return (out + 0.1 if backend == "cpu" else out), lse

    monkeypatch.setattr(functional, "block_sparse_attention", wrong)
    found = {finding.what: finding for finding in doctor._backends()}
    assert found["backend cpu"].status == "broken"
    assert "differs from the reference" in found["backend cpu"].detail
    assert found["backend reference"].status == "works"


def test_exit_code_and_json(monkeypatch, capsys):
    good = doctor.Finding("torch", "works", "2")
    monkeypatch.setattr(doctor, "examine", lambda: [good])
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"what": "torch", "status": "works", "detail": "2", "get": ""}
    ]
    monkeypatch.setattr(
        doctor, "examine", lambda: [good, doctor.Finding("av", "broken", "not installed", "make")]
    )
    assert main(["doctor"]) == 1


def test_the_kernel_cache_and_nvrtc_are_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("SLA2_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    for name in ("a.cubin", "a.cubin.json", "b.cubin.bad", "b.cubin.json.bad"):
        (tmp_path / "kernels" / name).write_bytes(b"x" * 2**19)
    found = doctor._kernel_cache()
    assert found.status == "works"
    assert (
        found.detail == f"{tmp_path / 'kernels'}: 1 built kernels, 2.0 MB, 1 damaged ones set aside"
    )
    monkeypatch.setattr("os.access", lambda *_: False)
    assert doctor._kernel_cache().get == "set SLA2_CACHE"
    monkeypatch.setenv("SLA2_NVRTC", str(tmp_path / "no.so"))
    found = doctor._nvrtc("do this")
    assert (found.status, found.get) == ("missing", "do this")
    assert "is no file" in found.detail


def test_a_gpu_s_products_are_told_by_precision(monkeypatch):
    slow = " (slower than 16 bit, in which forwards without gradients run)"
    monkeypatch.delenv("SLA2_WGMMA", raising=False)
    assert doctor._products(0, 9, 0).detail == (
        "sm_90a, wgmma (SLA2_WGMMA=0: mma.sync): full: HGMMA; int8: IGMMA and QGMMA;"
        " int8_int8: IGMMA; fp8: QGMMA"
    )
    monkeypatch.setenv("SLA2_WGMMA", "0")
    assert doctor._products(0, 9, 0).detail == (
        f"sm_90a, mma.sync (SLA2_WGMMA is 0): full: HMMA; int8: IMMA and HMMA, widened{slow};"
        f" int8_int8: IMMA; fp8: HMMA, widened{slow}"
    )
    assert doctor._products(1, 12, 0).detail == (
        "sm_120a: full: HMMA; int8: IMMA and QMMA.SF; int8_int8: IMMA; fp8: QMMA.SF"
    )
    assert "int8: none, no FP8; int8_int8: IMMA; fp8: none" in doctor._products(0, 8, 6).detail
    assert doctor._products(0, 7, 5).status == "missing"
