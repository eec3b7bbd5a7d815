"""Known vulnerabilities of the installed packages, by pip-audit, with the number of look-ups.

pip-audit exits with 0 even if its index has advisories for no package (a mirror without them). It
exits with 1 if the index does not answer. Neither is a finding, and neither proves the absence of
vulnerabilities.
"""

import json
import subprocess
import sys
from typing import Any


def judge_report(report: str, errors: str) -> tuple[int, str]:
    """Return the exit code and a message; only a known vulnerability fails."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (errors.strip().splitlines() or ["no report"])[-1]
        return 0, f"audit: NOT DONE, the advisories cannot be reached: {reason}"
    looked_up = [package for package in packages if "vulns" in package]
    vulnerable = [package for package in looked_up if package["vulns"]]
    if vulnerable:
        return 1, "\n".join(["audit: FAILED", *map(_format_package, vulnerable)])
    if not looked_up:
        return 0, f"audit: NOT DONE, no advisories for any of {len(packages)} packages"
    return 0, f"audit: done, nothing known against {len(looked_up)} of {len(packages)} packages"


def _format_package(package: dict[str, Any]) -> str:
    known = "; ".join(
        f"{v['id']} (fixed in {', '.join(v['fix_versions']) or 'no version yet'})"
        for v in package["vulns"]
    )
    return f"  {package['name']} {package['version']}: {known}"


def main() -> None:
    """Audit this environment, print the result, and exit."""
    options = ["--local", "--skip-editable", "--format", "json", "--progress-spinner", "off"]
    command = [sys.executable, "-m", "pip_audit", *options, "--timeout", "15"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    code, message = judge_report(ran.stdout, ran.stderr)
    print(message)  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main()
