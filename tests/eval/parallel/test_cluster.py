"""Starting and joining Ray, with a stand-in for Ray: a start that fails once, one that fails for
good, and whose end it is.
"""

import os
import sys
import types

import pytest
from sla2_eval.parallel.cluster import Cluster, check_address, enter, place


class Ray(types.ModuleType):
    """The part of Ray that joins clusters; `failures` starts fail first."""

    def __init__(self, failures: int = 0, initialized: bool = False):
        super().__init__("ray")
        self.failures, self.initialized, self.calls = failures, initialized, []

    def is_initialized(self) -> bool:
        return self.initialized

    def init(self, **options) -> None:
        self.calls.append(options)
        if len(self.calls) <= self.failures:
            raise ConnectionError("The node timed out\nduring startup.\n")
        self.initialized = True

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.initialized = False

    def cluster_resources(self) -> dict:
        return {"CPU": 4.0, "GPU": 2.0}


@pytest.fixture
def ray(monkeypatch):
    def install(**options) -> Ray:
        found = Ray(**options)
        monkeypatch.setitem(sys.modules, "ray", found)
        return found

    return install


def test_a_local_cluster_is_started_ended_and_tells_nobody(ray, monkeypatch):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    found = ray()
    cluster = Cluster(None, num_cpus=3, num_gpus=2)
    assert (cluster.cpus, cluster.gpus) == (4.0, 2.0)
    (options,) = found.calls
    assert {k: options[k] for k in ("address", "num_cpus", "num_gpus", "include_dashboard")} == {
        "address": "local",
        "num_cpus": 3,
        "num_gpus": 2,
        "include_dashboard": False,
    }
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    cluster.close()
    assert found.calls[1:] == ["shutdown"]


def test_a_local_start_that_fails_is_tried_once_more(ray):
    found = ray(failures=1)
    Cluster(None, num_cpus=1)
    assert [call if call == "shutdown" else "init" for call in found.calls] == [
        "init",
        "shutdown",
        "init",
    ]


def test_a_start_that_fails_for_good_is_one_line(ray):
    ray(failures=9)
    with pytest.raises(
        RuntimeError, match=r"^ray: expected a cluster at 'local', got: The node timed out$"
    ):
        Cluster(None, num_cpus=1)
    found = ray(failures=9)
    with pytest.raises(RuntimeError, match="expected a cluster at 'auto', got: The node timed out"):
        Cluster("auto")
    assert len(found.calls) == 2  # a cluster that is not there does not appear by asking again


def test_a_cluster_joined_before_is_left_as_it_is(ray):
    found = ray(initialized=True)
    Cluster("auto").close()
    assert found.calls == []


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:port", ""])
def test_addresses_of_no_known_form(address):
    with pytest.raises(
        ValueError,
        match=f"ray_address: expected 'auto', host:port or ray://host:port, got '{address}'",
    ):
        check_address(address)
    check_address("auto")
    check_address("ray://somewhere:10001")


def test_a_worker_looks_for_modules_where_the_driver_does(tmp_path, monkeypatch):
    """Ray puts the driver's current folder on its workers' path in any case."""
    driver = tmp_path / "driver"
    driver.mkdir()
    monkeypatch.chdir(driver)
    for path, searched in [(["/lib"], False), (["", "/lib"], True), (["/lib", str(driver)], True)]:
        monkeypatch.setattr("sys.path", path)
        here = place()
        assert here == (str(driver), searched)
        monkeypatch.setattr("sys.path", [str(driver), "/lib"])
        os.chdir(tmp_path)
        enter(*here)
        assert os.getcwd() == str(driver)
        assert sys.path == ([str(driver), "/lib"] if searched else ["/lib"])
    os.chdir(tmp_path)
    enter(str(tmp_path / "elsewhere"), True)
    assert os.getcwd() == str(tmp_path)
