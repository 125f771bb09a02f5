"""The Ray cluster of replicas: what is refused before, and whether there is room for replicas.

That a cluster of our own ends is tested with the commands that use one.
"""

import socket
import sys

import pytest

from model.errors import InputError
from pacore_sched.replicas.cluster import check_room, connected


def node(alive: bool = True, **resources: float) -> dict:
    return {"Alive": alive, "Resources": resources}


def test_room():
    """Replicas that no node can hold: half a GPU on each of two nodes holds no replica."""
    nodes = [node(GPU=2, CPU=9), node(GPU=1, CPU=1), node(alive=False, GPU=8, CPU=64)]
    free = {"GPU": 3.0, "CPU": 10.0}
    check_room(nodes, free, 3, gpus=1, cpus=1)
    with pytest.raises(InputError, match="--replicas 4: each needs 1 GPU.* has 3.*room for 3"):
        check_room(nodes, free, 4, gpus=1, cpus=1)
    with pytest.raises(InputError, match="each needs 2 CPU.*room for 4"):
        check_room(nodes, free, 5, gpus=0, cpus=2)
    with pytest.raises(InputError, match="2 free: room for 2"):
        check_room(nodes, {"GPU": 2.0, "CPU": 10.0}, 3, gpus=1, cpus=1)
    with pytest.raises(InputError, match="each needs 1 GPU.* has 0"):
        check_room([node(CPU=4)], {"CPU": 4.0}, 1, gpus=1, cpus=1)
    halves = [node(CPU=1.5), node(CPU=1.5)]
    with pytest.raises(InputError, match="room for 2"):
        check_room(halves, {"CPU": 3.0}, 3, gpus=0, cpus=1)
    check_room([node(CPU=1)], {"CPU": 1.0}, 3, gpus=0, cpus=1 / 3)


def refusal(address: str | None) -> str:
    with pytest.raises(InputError) as raised, connected(address, 1, gpus=0, cpus=1):
        pass
    return str(raised.value)


def test_without_ray(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'step3vl-pacore[ray]'" in refusal(None)


@pytest.mark.parametrize(
    "address", ["head", ":6379", "head:port", "ray://head:10001", "127.0.0.1:0", "127.0.0.1:99999"]
)
def test_bad_address(address: str):
    pytest.importorskip("ray")
    assert f"--ray-address {address}" in refusal(address)


@pytest.mark.cli
def test_address_without_a_cluster(monkeypatch: pytest.MonkeyPatch):
    """Guards against Ray's own retries, which last two minutes and end this process."""
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("pacore_sched.replicas.cluster.ANSWER_S", 1.0)
        assert "no Ray cluster" in refusal(address)
    assert f"--ray-address {address} cannot be reached" in refusal(address)
