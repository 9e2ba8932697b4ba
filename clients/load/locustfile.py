r"""Load with Locust on a served classifier: answers are checked, and the rate can be one that no server slows down.

examples, closed loop: so many users, each of which waits for its answer (`pip install 'millibert[load]'`)
  locust -f clients/load/locustfile.py --host grpc://127.0.0.1:8001 --models banking77 --texts test.csv
  locust -f clients/load/locustfile.py --host http://127.0.0.1:8000 --models banking77=3,support=1 \
         --texts synthetic:lognormal:mean=15,sigma=0.6,max=128 --headless --users 64 --shape step --duration 60

open loop: so many requests a second, whatever the server does; a latency counts from the moment the request was due
  locust -f clients/load/locustfile.py --host grpc://127.0.0.1:8001 --models banking77 --texts test.csv \
         --headless --rate 400 --spacing poisson --shape spike --duration 60
  locust … --rate 2000 --processes 2 --users 2          the rate is divided among workers by their users
  locust … --rate 2000 --master --expect-workers 4 --users 4, and `locust -f … --worker` for each worker

Locust's web page is at http://127.0.0.1:8089, unless --headless is given. With --duration the load ends by itself, and
has a --shape; --users and --rate are then the largest. What is not answered is in the table of failures as `refused`,
`timed out`, `wrong` or `failed`. --requests-file keeps every request: when it was due, how long it took, what became of
it; each of Locust's processes writes a file of its own, named after it.

exit status: Locust's own: 0 all answered, 1 some were not
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
from locust import LoadTestShape, events
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from load.locust_run import RequestsFile
from load.locust_shapes import SHAPES, Level, Schedule, levels_of
from load.locust_users import STATE, Bench, GrpcTextUser, HttpTextUser, Plan, TextUser
from load.texts import read_source
from millibert._address import parse_target
from millibert._errors import MillibertError, UsageError

# What Locust looks for in this file.
__all__ = ["GrpcTextUser", "HttpTextUser"]

_SHARE = "millibert-share"
_SPACINGS = ("even", "poisson")
# For workers to say that their users are there.
_PATIENCE_SECONDS = 60.0
_log = logging.getLogger(__name__)


class LoadShape(LoadTestShape):
    """As many users as there should be, until the load is over: counted from when all users were first there."""

    # Else Locust would use it even where no shape is asked for.
    abstract = True

    def __init__(self, levels: Sequence[Level], users: int, changes_users: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._levels = levels
        self._users = users
        self._changes_users = changes_users

    def tick(self) -> tuple[int, float] | None:
        """How many users there should be now; None: the end. Of an open loop they stay, and the rate changes."""
        elapsed, end = STATE.elapsed, 0.0
        for level in self._levels:
            end += level.seconds
            if elapsed < end:
                users = max(1, round(level.share * self._users)) if self._changes_users else self._users
                # All at once: a ramp is a shape of its own.
                return users, self._users
        if isinstance(self.runner, MasterRunner):
            # Locust would tell its workers to quit, and not wait for what they have under way.
            self.runner.stop()
        return None


def add_arguments(parser: Any) -> None:
    """Beside Locust's own; all but the last few are on its web page too."""
    parser.add_argument("--models", default="", metavar="NAME[=WEIGHT],…", help="what to ask, and how often of all")
    parser.add_argument(
        "--texts", default="", metavar="FILE", help="texts, or synthetic:DISTRIBUTION:… (load/texts.py)"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--texts-per-request", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="of a request (default: 10)")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="closed loop: after each answer")
    parser.add_argument("--rate", type=float, default=0.0, metavar="N", help="open loop: requests/s in all (0: closed)")
    parser.add_argument("--spacing", choices=_SPACINGS, default=_SPACINGS[0], help="of the open loop")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the open loop's random spacing")
    hidden = {"include_in_web_ui": False}
    parser.add_argument("--protocol", choices=("grpc", "http"), help="default: that of --host", **hidden)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="steady", help="default: %(default)s", **hidden)
    parser.add_argument("--duration", type=float, default=0.0, metavar="SECONDS", help="0: without an end", **hidden)
    parser.add_argument("--requests-file", default="", metavar="PATH", help="keep every request there", **hidden)


def begin(environment: Environment, **_: object) -> None:
    """Set the shape, and where all is known already ask what the right answers are before the clock runs."""
    options, runner = _options(environment), environment.runner
    if isinstance(runner, WorkerRunner):
        runner.register_message(_SHARE, _take_share)
    else:
        _listen(environment.events.spawning_complete, partial(_divide, environment))
    try:
        if not isinstance(runner, WorkerRunner):
            environment.user_classes = [_users_of(environment)]
            environment.shape_class = _shape(environment)
        if environment.host and options.models and options.texts:
            STATE.aim(read_plan(environment))
        return
    except MillibertError as error:
        _log.error("%s", error)  # without a traceback: it says what to do
    # Not above, where the error still holds on to the connections.
    close()
    sys.exit(1)


def prepare(environment: Environment, **_: object) -> None:
    """Make what the users need; where that fails, end."""
    STATE.bench = None
    try:
        target = STATE.aim(read_plan(environment))
    except MillibertError as error:
        _log.error("%s", error)
        environment.process_exit_code = 1
        # Not here: Locust is in the midst of starting.
        gevent.spawn(_stop, environment)
        return
    path, sends = _options(environment).requests_file, not isinstance(environment.runner, MasterRunner)
    file = RequestsFile(Path(f"{path}.{os.getpid()}")) if path and sends else None
    STATE.bench = Bench(environment, target, file)
    _log.info("%s", target.plan.texts.description)


def stop(environment: Environment, **_: object) -> None:
    """Users that end from now on end for good."""
    if STATE.bench is not None:
        STATE.bench.stopping = True


def end(environment: Environment, **_: object) -> None:
    """Nothing more will come."""
    STATE.began = None
    if STATE.bench is not None:
        STATE.bench.end()


def close(**_: object) -> None:
    """Close the connections, and let go of them: a channel that is only collected when Python ends blocks it."""
    STATE.bench = None
    STATE.close()
    gc.collect()


def _stop(environment: Environment) -> None:
    assert environment.runner is not None, "there is one where a test starts"
    (environment.runner.stop if environment.web_ui else environment.runner.quit)()


def _divide(environment: Environment, user_count: int, **_: object) -> None:
    """All users are there, so the load begins: in an open loop, each worker has a share as large as its users'."""
    runner = environment.runner
    if STATE.bench is None:
        return
    if isinstance(runner, MasterRunner) and not _all_are_there(runner):
        _log.error("not all users were there after %g s: their share of the load is not sent", _PATIENCE_SECONDS)
        environment.process_exit_code = 1
    STATE.begin()
    if STATE.bench.open_loop is None:
        return
    if not isinstance(runner, MasterRunner):
        STATE.bench.open_loop.share(0, user_count, user_count)
        return
    workers = [(client.id, client.user_count) for client in runner.clients.all]
    if idle := sum(not count for _, count in workers):
        _log.warning("%d workers have no users, and so no share of the rate: give --users at least as many", idle)
    total, first = sum(count for _, count in workers), 0
    for worker, count in workers:
        runner.send_message(_SHARE, {"first": first, "own": count, "total": total}, worker)
        first += count


def _all_are_there(runner: MasterRunner) -> bool:
    """Wait for the workers' reports, which come after Locust has gone on."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while runner.user_count != runner.target_user_count:
        if time.monotonic() > end:
            return False
        gevent.sleep(0.05)
    return True


def _take_share(environment: Environment, msg: Any) -> None:
    if STATE.bench is not None and STATE.bench.open_loop is not None:
        STATE.bench.open_loop.share(**msg.data)


def _users_of(environment: Environment) -> type[TextUser]:
    """Those of the url's protocol."""
    options, users = _options(environment), {each.protocol: each for each in (GrpcTextUser, HttpTextUser)}
    if not environment.host:
        return users[options.protocol or "grpc"]
    protocol = parse_target(environment.host).addresses[0].protocol
    if options.protocol not in (None, protocol):
        raise UsageError(f"--protocol {options.protocol}, and the url {environment.host} is of {protocol}")
    return users[protocol]


def _shape(environment: Environment) -> LoadTestShape | None:
    options = _options(environment)
    if not options.duration:
        return None
    levels = levels_of(options.shape, options.duration)
    shape = LoadShape(levels, options.num_users or 1, changes_users=not options.rate)
    shape.runner = environment.runner
    return shape


def _options(environment: Environment) -> Any:
    assert environment.parsed_options is not None, "Locust was started by its command line"
    return environment.parsed_options


def read_models(text: str) -> tuple[tuple[str, float], ...]:
    """Read `a=3,b=1`, or names alone; raises `UsageError`."""
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError("--models names the models to ask, such as banking77, or banking77=3,support=1")
    models = {name: _weight(name, value) if given else 1.0 for name, given, value in parts}
    if len(models) < len(parts):
        raise UsageError(f"--models {text}: a model is named twice")
    return tuple(models.items())


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError as error:
        raise UsageError(f"--models: the weight of {name} is a number, not {text!r}") from error
    if not 0 < weight < math.inf:
        raise UsageError(f"--models: the weight of {name} is above 0, not {text}")
    return weight


def read_plan(environment: Environment) -> Plan:
    """What the arguments, or the web page, ask for; raises `UsageError`."""
    options = _options(environment)
    if not environment.host:
        raise UsageError("--host says where the server is, such as grpc://127.0.0.1:8001")
    _check_numbers(options)
    if not options.texts:
        raise UsageError("--texts names a file, or synthetic:lognormal:mean=15,sigma=0.6 and the like")
    levels = levels_of(options.shape, options.duration) if options.duration else []
    schedule = Schedule(levels, options.rate, options.spacing == "poisson", options.seed) if options.rate else None
    return Plan(
        url=environment.host,
        models=read_models(options.models),
        texts=read_source(options.texts, options.text_column),
        per_request=options.texts_per_request,
        timeout=options.timeout,
        wait=options.wait,
        schedule=schedule,
    )


def _check_numbers(options: Any) -> None:
    """The web page hands over whatever was typed."""
    for name, least in (("rate", 0.0), ("wait", 0.0), ("duration", 0.0), ("texts_per_request", 1), ("timeout", 1e-3)):
        value = getattr(options, name)
        if not least <= value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is a number from {least:g} on, not {value:g}")


def _listen(event: Any, listener: Callable[..., None]) -> None:
    event.add_listener(listener)


_listen(events.init_command_line_parser, add_arguments)
_listen(events.init, begin)
_listen(events.test_start, prepare)
_listen(events.test_stopping, stop)
_listen(events.test_stop, end)
_listen(events.quitting, end)
_listen(events.quit, close)
