"""serve.child: the ports that engines get."""

import socket
from pathlib import Path

import pytest

from loadstone.serve import child


def test_ports_are_different_and_free() -> None:
    ports = child.free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("told", "first", "below"),
    [("32768\t60999\n", 32768, True), ("1024 65535\n", 1024, False), ("", 0, False)],
    ids=["usual", "all of them", "not told"],
)
def test_no_outgoing_connection_takes_an_engines_port_while_it_loads(
    told: str, first: int, below: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tmp_path / "range"
    known.write_text(told)
    monkeypatch.setattr(child, "_OUTGOING", known)
    ports = child.free_ports(20)
    assert all(port < first for port in ports) is below


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = child.free_port() + 1
    (tmp_path / "range").write_text(f"{first} 60999")
    monkeypatch.setattr(child, "_OUTGOING", tmp_path / "range")
    monkeypatch.setattr(child, "_PORTS", 1)
    monkeypatch.setattr(child, "_TRIES", 1)
    assert child.free_port() == first - 1
    with socket.create_server(("127.0.0.1", first - 1)):
        assert child.free_port() != first - 1
