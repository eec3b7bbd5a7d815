"""Known vulnerabilities of what is installed, by pip-audit; says plainly what was looked up.

pip-audit ends well where its index answers for no package at all (a mirror without advisories), and
badly where it answers nothing: neither is a finding, and neither is a clean bill.
"""

import json
import subprocess
import sys
from typing import Any


def verdict(report: str, errors: str) -> tuple[int, str]:
    """The exit code, and what to say: only a known vulnerability fails."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (errors.strip().splitlines() or ["no report"])[-1]
        return 0, f"audit: NOT DONE, the advisories cannot be reached: {reason}"
    looked_up = [package for package in packages if "vulns" in package]
    found = [package for package in looked_up if package["vulns"]]
    if found:
        return 1, "\n".join(["audit: FAILED", *map(_line, found)])
    if not looked_up:
        return 0, f"audit: NOT DONE, no advisories for any of {len(packages)} packages"
    return 0, f"audit: done, nothing known against {len(looked_up)} of {len(packages)} packages"


def _line(package: dict[str, Any]) -> str:
    known = "; ".join(
        f"{v['id']} (fixed in {', '.join(v['fix_versions']) or 'no version yet'})"
        for v in package["vulns"]
    )
    return f"  {package['name']} {package['version']}: {known}"


def main() -> None:
    """Audit this environment."""
    options = ["--local", "--skip-editable", "--format", "json", "--progress-spinner", "off"]
    command = [sys.executable, "-m", "pip_audit", *options, "--timeout", "15"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    code, said = verdict(ran.stdout, ran.stderr)
    print(said)  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main()
