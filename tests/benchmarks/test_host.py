"""The benchmark of the host's time: it prepares the launches of a forward and makes none."""

from sla2_kernels import launch

from benchmarks.host import microseconds, operator, stubbed


def test_the_operator_prepares_its_launches_without_a_gpu(monkeypatch):
    ran = []
    monkeypatch.setattr("benchmarks.host._Stub.__call__", lambda *args, **_: ran.append(args))
    with stubbed():
        call = operator()
        call()
        once = len(ran)
        assert once == 8
        assert microseconds(call, repetitions=2) > 0
    assert len(ran) == 23 * once
    assert all(isinstance(x, tuple(launch._SCALARS)) for args in ran for x in args[3])
