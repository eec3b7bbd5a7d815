"""Trials per second over HTTP against raw Optuna, on the same PostgreSQL, in the same run.

Our cycle is lease + 3 reports + finish, by HTTP to a real `warmscale serve`. Optuna's cycle is
ask + suggest of 5 parameters + 3 x trial.report + tell on a separate RDBStorage. Optuna runs in a
process for each client, as users run it (`--threads`: all clients in the same process). Both sides
have the same distributions, finished trials, values and sampler (TPE, constant_liar), and share a
server with fsync on. The sides take turns, and the order of a pair changes from round to round.

    python benchmarks/service_throughput.py [--quick] [--finished 100 10000] [--clients 1 16]
        [--rounds 5] [--pruners none median] [--json FILE] [--markdown FILE]

The clients of both sides, the API and PostgreSQL share the cores of this machine. The loop contains
no training: it measures the highest rate at which a study can be served.

The whole matrix, on 1 core and on 2, with 1 API process and with 2, takes about 13 minutes:

    for cores in 1 0,1; do for replicas in 1 2; do
        taskset -c $cores python benchmarks/service_throughput.py --replicas $replicas \\
            --finished 100 10000 --clients 1 16 --rounds 3 --cycles 40
    done; done

Each run prints cores, load, fdatasync and rounds. Tables follow with ratios, percentiles of each
call, CPU per trial and resident memory. On a busy machine put `chrt -f 10` before `taskset`.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from throughput import machine, report
from throughput.measuring import Measured, measure_scenario
from throughput.sides import Optuna, Service
from throughput.stack import run_stack
from throughput.workload import Scenario


def main() -> None:
    arguments = parse_arguments()
    # Under root the embedded server runs as another user and must be able to read its folder.
    with tempfile.TemporaryDirectory(prefix="warmscale-", ignore_cleanup_errors=True) as folder:
        measured, conditions = run_scenarios(arguments, Path(folder))
    text = report.format_markdown(conditions, measured)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    if arguments.json is not None:
        rows = [asdict(row) | {"ratios": row.ratios} for row in measured]
        arguments.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finished", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--pruners", nargs="+", default=["none"], choices=report.PRUNERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cycles", type=int, help="cycles a round; by default 60, or 5 a client if that is more"
    )
    parser.add_argument("--replicas", type=int, default=1, help="API processes")
    parser.add_argument("--threads", action="store_true", help="Optuna's clients in one process")
    parser.add_argument("--typed", action="store_true", help="our clients use service.client")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke test, in seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.finished, arguments.clients, arguments.rounds, arguments.cycles = [20], [2], 1, 4
    return arguments


def run_scenarios(
    arguments: argparse.Namespace, folder: Path
) -> tuple[list[Measured], dict[str, object]]:
    measured: list[Measured] = []
    with run_stack(folder, replicas=arguments.replicas) as running:
        conditions = machine.describe_conditions(running, arguments)
        for clients in arguments.clients:
            with (
                Service(running, clients, typed=arguments.typed) as ours,
                Optuna(running, clients, threads=arguments.threads) as theirs,
            ):
                for finished in arguments.finished:
                    for pruner in arguments.pruners:
                        cycles = arguments.cycles or max(60, 5 * clients)
                        scenario = Scenario(finished, clients, pruner, arguments.rounds, cycles)
                        measured.append(measure_scenario(scenario, ours, theirs, running))
    return measured, conditions


if __name__ == "__main__":
    main()
