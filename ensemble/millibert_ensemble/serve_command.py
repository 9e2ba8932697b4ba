"""Run Triton on a model repository, in the foreground, on this machine.

Prints one line to standard output once inference works: the endpoints and the names of the services.
Everything else, Triton's log among it, goes to standard error. SIGTERM and Ctrl-C let requests in flight
finish (--drain-seconds; a second one hurries). A model whose process dies takes the server down and has it started
again; when that happens twice within a minute, the command ends.

Exit status: 0 after a drained stop, 1 otherwise.

    millibert serve --repository model_repository
    millibert serve --http-port 0 --grpc-port 0 --metrics-port 0 --json      # for scripts
    millibert serve --host 0.0.0.0 --health-port 8003                        # for a kubelet's probes
    millibert serve --repository model_repository -- --grpc-use-ssl=true --grpc-server-cert=server.pem \
        --grpc-server-key=server.key                                         # tritonserver's own options
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from pathlib import Path

from millibert_ensemble.canary import Canary, through
from millibert_ensemble.engine_choice import add_engine, engine_options
from millibert_ensemble.health import Health
from millibert_ensemble.health_server import HealthServer
from millibert_ensemble.ports import LOCALHOST, Ports
from millibert_ensemble.server import DRAIN_SECONDS, TritonServer, has_gpu
from millibert_ensemble.supervisor import Supervisor

_DEFAULT_PORTS = Ports()


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `millibert serve`."""
    parser.add_argument(
        "--repository",
        type=Path,
        default=Path("model_repository"),
        metavar="DIR",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--host",
        default=LOCALHOST,
        metavar="ADDR",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    for use, port in _DEFAULT_PORTS._asdict().items():
        parser.add_argument(
            f"--{use}-port",
            type=_port,
            default=port,
            metavar="N",
            help="default: %(default)s; 0: any free one",
        )
    add_engine(parser)
    parser.add_argument(
        "--health-port",
        type=_port,
        metavar="N",
        help="answer /ready, /live and /metrics there, from a text sent through the service every 2 s (default: not)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=_seconds,
        default=DRAIN_SECONDS,
        metavar="S",
        help="how long requests in flight may take after SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the ready line as JSON")
    parser.add_argument(
        "triton_options", nargs="*", metavar="OPTION", help="after `--`: options of tritonserver itself, --NAME=VALUE"
    )
    parser.set_defaults(wrong_usage=parser.error)
    parser.add_argument("--verbose", action="store_true", help="let Triton log what it loads")


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit status."""
    if strays := [option for option in args.triton_options if not option.startswith("--")]:
        args.wrong_usage(f"options of tritonserver are written --NAME=VALUE, not {' '.join(strays)}")
    ports = Ports(args.http_port, args.grpc_port, args.metrics_port)
    options = [*engine_options(args.repository, args.engine, _report), *args.triton_options]
    with contextlib.ExitStack() as stack:
        health = Health()
        # Before the server's own ports are chosen, and up while it starts.
        endpoint = None if args.health_port is None else HealthServer(health, args.host, args.health_port)
        server = TritonServer(
            args.repository,
            host=args.host,
            ports=ports,
            verbose=args.verbose,
            options=options,
            drain_seconds=args.drain_seconds,
        )
        health_url = None
        if endpoint:
            stack.enter_context(endpoint)
            health_url = f"http://{server.reachable_host}:{endpoint.port}"
            send = through(server.reachable_host, server.ports.http, server.services)
            stack.enter_context(Canary(health, send))
        _report(f"starting Triton on {server.repository}")
        if not has_gpu():
            _report("no NVIDIA GPU here: what Triton logs about CUDA means just that")
        announce = functools.partial(_announce_json if args.json else _announce, server, health_url)
        return Supervisor(server, health=health, announce=announce, report=_report).run()


def _announce(server: TritonServer, health_url: str | None) -> None:
    endpoints = "  ".join(filter(None, [server.grpc_url, server.http_url, server.metrics_url, health_url]))
    print(f"ready: {', '.join(server.services)}  {endpoints}", flush=True)


def _announce_json(server: TritonServer, health_url: str | None) -> None:
    facts = {
        "models": server.services,
        "grpc": server.grpc_url,
        "http": server.http_url,
        "metrics": server.metrics_url,
        "health": health_url,
        "pid": os.getpid(),
        "server_pid": server.pid,
    }
    print(json.dumps(facts), flush=True)


def _report(message: str) -> None:
    print(f"millibert serve: {message}", file=sys.stderr, flush=True)


def _seconds(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} s is no time: 1 or more")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not a port: 0 to 65535")
    return number
