"""CPU time of a tritonserver of this machine and of the processes that run its models."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from millibert_ensemble import processes

SERVER = "tritonserver"


def server_at(host: str, port: int) -> int | None:
    """The pid of the tritonserver of this machine that listens there; None where there is none, or it is hidden."""
    if not _is_here(host):
        return None
    for process in psutil.process_iter(["name"]):
        if process.info["name"] != SERVER:
            continue
        try:
            listening = [c for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
        if any(connection.laddr.port == port for connection in listening):
            return process.pid
    return None


def cpu_seconds(server: int) -> dict[str, float]:
    """User and system time, in seconds, of the server itself and of each model's processes."""
    found = {SERVER: _seconds(server)}
    for stub in processes.stubs(server):
        found[stub.model] = found.get(stub.model, 0.0) + _seconds(stub.pid)
    return found


def _seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _is_here(host: str) -> bool:
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    except (OSError, ValueError):
        return False
    return address.is_loopback
