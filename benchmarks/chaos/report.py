"""The numbers of a run of chaos, as JSON and as a row of benchmarks/chaos.md."""

import statistics
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.chaos.driver import Driver

END_OF_ROWS = "<!-- rows end here -->"


def summarize_run(driver: Driver, *, seed: int, minutes: float) -> dict[str, Any]:
    counts = _count_rows(driver)
    # A recovery counts from the fault, and includes the time before the repair.
    seconds = sorted(seconds for _, seconds in driver.recoveries)
    kinds = sorted({kind for kind, _ in driver.recoveries})
    return {
        "seed": seed,
        "minutes": round(minutes, 1),
        "faults": dict(sorted(driver.struck.items())),
        "missed": dict(driver.missed),
        "studies": len(driver.studies),
        **counts,
        "lost": driver.lost,
        "doubled": driver.doubled,
        "violations": driver.violations,
        "fleets_fallen": driver.stack.restarts,
        "refused_409": driver.stack.proxy.refused,
        "cut": driver.stack.proxy.num_cut,
        "recovery_seconds": {
            "p50": round(statistics.median(seconds), 2) if seconds else None,
            "max": round(seconds[-1], 2) if seconds else None,
            "by_kind_max": {
                kind: round(max(s for k, s in driver.recoveries if k == kind), 2) for kind in kinds
            },
        },
        "errors": driver.errors,
    }


def _count_rows(driver: Driver) -> dict[str, int]:
    query = """SELECT count(*) FILTER (WHERE kind = 'trial') AS trials,
        count(*) FILTER (WHERE kind = 'target') AS targets, sum(attempt) AS attempts,
        sum(failures) AS failures, max(failures) AS most_failures FROM warmscale.runs"""
    with driver.stack.engine.connect() as connection:
        return {k: int(v or 0) for k, v in connection.execute(text(query)).one()._mapping.items()}  # noqa: SLF001


def format_row(summary: dict[str, Any]) -> str:
    recovery = summary["recovery_seconds"]
    faults = ", ".join(f"{kind} {n}" for kind, n in summary["faults"].items())
    # The columns of the table in chaos.md, in its order.
    cells = [
        *(summary["seed"], summary["minutes"], sum(summary["faults"].values()), summary["studies"]),
        *(
            summary["trials"],
            summary["targets"],
            summary["attempts"],
            summary["lost"],
            summary["doubled"],
        ),
        *(len(summary["violations"]), summary["refused_409"]),
        f"{recovery['p50']} / {recovery['max']}",
        faults,
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def append_row(path: Path, line: str) -> None:
    page = path.read_text()
    path.write_text(page.replace(END_OF_ROWS, f"{line}\n{END_OF_ROWS}"))
