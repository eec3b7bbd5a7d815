"""The fleet's command line: `python -m workers.fleet --url http://127.0.0.1:8000`.

The API key comes from the environment alone (WARMSCALE_API_KEY), because every user of a machine
can read command lines. SIGTERM or Ctrl-C drains: every run publishes a checkpoint and is given
back, and the fleet exits with 0. A second signal, or a signal while Ray starts, ends the fleet and
Ray's processes at once. A fleet that lost the connection to Ray exits with 1.
"""

import argparse
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.observability import logs
from workers.fleet import ray_environment
from workers.fleet.ray_authentication import ClusterRefusedError
from workers.fleet.service_link import FleetRefusedError
from workers.fleet.signals import Stop

if TYPE_CHECKING:
    from workers.fleet.dispatcher import Dispatcher
    from workers.fleet.ray_engine import Engine

API_KEY_VARIABLE = "WARMSCALE_API_KEY"

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a fleet until it is drained, idle or refused; return the exit code."""
    args = _make_parser().parse_args(argv)
    api_key = os.environ.get(API_KEY_VARIABLE)
    if not api_key:
        sys.stderr.write(f"set {API_KEY_VARIABLE} to a key with the scope `work`\n")
        return 2
    try:
        logs.configure_logging(logs.read_format(os.environ))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    stop = Stop()
    # Ray prints a paragraph to stdout for every lost process; our log already has a line.
    with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
        try:
            return _run_fleet(args, api_key, stop)
        except ClusterRefusedError as error:
            log.error("refused", extra={"error": error})  # noqa: TRY400 - the message says it all
            return 1


def _run_fleet(args: argparse.Namespace, api_key: str, stop: Stop) -> int:
    started = time.monotonic()
    with logs.add_fields(fleet=args.name), _open_engine(args) as engine:
        from workers.fleet.dispatcher import Dispatcher, DispatcherOptions  # noqa: PLC0415 - see `_open_engine`

        options = DispatcherOptions(
            url=args.url,
            api_key=api_key,
            name=args.name,
            study=args.study,
            kinds=tuple(args.kinds) if args.kinds else None,
            checkpoint_seconds=args.checkpoint_seconds,
            exit_when_idle_seconds=args.exit_when_idle,
            drain_seconds=args.drain_seconds,
        )
        dispatcher = Dispatcher(engine, options)
        processes = engine.warm_up()
        stop.drain_with(dispatcher.drain)
        seconds = round(time.monotonic() - started, 1)
        log.info("ready", extra={"processes_warm": len(processes), "seconds": seconds})
        return _run_dispatcher(dispatcher)


def _run_dispatcher(dispatcher: "Dispatcher") -> int:
    from workers.fleet.ray_engine import RayLostError  # noqa: PLC0415 - see `_open_engine`

    try:
        dispatcher.run()
    except FleetRefusedError as error:
        log.error("refused", extra={"error": error})  # noqa: TRY400 - a traceback would add nothing
        return 1
    except RayLostError as error:
        log.error("lost", extra={"error": error})  # noqa: TRY400
        os._exit(1)  # `ray.shutdown` would wait a minute; Ray's processes end with this process
    return 0


def _open_engine(args: argparse.Namespace) -> contextlib.AbstractContextManager["Engine"]:
    """Set the environment that Ray reads at import, then import Ray and connect."""
    if args.ray_address is None:
        ray_environment.set_for_local_ray()
    else:
        ray_environment.set_for_any_ray()
    from workers.fleet import ray_engine as engine  # noqa: PLC0415

    if args.ray_address is None:
        return engine.start_local(cpus=args.cpus, gpus=args.gpus)
    return engine.join_cluster(args.ray_address)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workers.fleet", description=__doc__, allow_abbrev=False)
    parser.add_argument("--url", required=True, help="URL of the service")
    parser.add_argument(
        "--ray-address", help="a running Ray cluster; `auto` for the cluster of this node"
    )
    parser.add_argument("--cpus", type=int, help="CPUs of a local Ray; all by default")
    parser.add_argument("--gpus", type=int, help="GPUs of a local Ray; all by default")
    parser.add_argument("--study", help="name or id of a study; by default any study")
    parser.add_argument("--kinds", nargs="+", choices=("trial", "target"))
    parser.add_argument("--checkpoint-seconds", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--exit-when-idle", type=float, metavar="SECONDS")
    parser.add_argument("--drain-seconds", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--name", default=f"{socket.gethostname()}-{os.getpid()}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
