"""What Lorica stands on: the licences of its dependencies, and known weaknesses in them.

    python scripts/supply_chain.py licences      # fails on a licence that is not on the list
    python scripts/supply_chain.py advisories    # fails on a known weakness; needs a network

Licences are those of everything that `pip install lorica` with all extras for users brings along.
Advisories are asked of PyPI by pip-audit for the pinned versions of constraints.txt. Where PyPI
cannot be asked, that is said, and it is no failure: `make check` has to work on a train.
"""

import argparse
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOR_DEVELOPERS = ("dev", "release")
"""Extras that no user installs."""

ALLOWED = (
    r"apache|\bmit\b|\bbsd\b|\bisc\b|\bpsf|python software foundation|mpl-2\.0|"
    r"mozilla public license 2|0bsd|bsl-1\.0|cc0|\bzlib\b|\bhpnd\b|cnri-python|unlicense|^lgpl"
)
"""All of these go together with Apache-2.0 in a program that links to them unchanged."""


def dependencies() -> list[str]:
    """Names of all distributions that lorica and its extras need, as installed here, sorted."""
    own = metadata.distribution("lorica")
    extras = [e for e in own.metadata.get_all("Provides-Extra") or [] if e not in FOR_DEVELOPERS]
    found: set[str] = set()
    waiting = list(_needed(own, ["", *extras]))
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra or a platform that is not here
        found.add(name)
        waiting += _needed(distribution, [""])
    return sorted(found)


def _needed(distribution: metadata.Distribution, extras: list[str]) -> set[str]:
    needed = set()
    for text in distribution.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            needed.add(re.sub(r"[-_.]+", "-", requirement.name).lower())
    return needed


def licence_of(name: str) -> str:
    """The licence of an installed distribution in its own words, in one line."""
    data = metadata.metadata(name)
    classifiers = [
        text.split("::")[-1].strip()
        for text in data.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    given = (data.get("License") or "").strip().splitlines()
    return data.get("License-Expression") or "; ".join(classifiers) or (given or ["none given"])[0]


def parts_that_are_not_allowed(licence: str) -> list[str]:
    """Of "A AND (B OR C)" the parts without a permitted choice."""
    needed = re.split(r"\s+AND\s+|;\s*", licence.strip("() "))
    return [
        part
        for part in needed
        if not any(re.search(ALLOWED, choice.lower()) for choice in re.split(r"\s+OR\s+", part))
    ]


def check_licences() -> int:
    wrong = []
    for name in dependencies():
        licence = licence_of(name)
        print(f"{name:28} {licence[:80]}")
        if parts := parts_that_are_not_allowed(licence):
            wrong.append(f"{name}: {', '.join(parts)}")
    if wrong:
        print("not on the list of licences in scripts/supply_chain.py:", *wrong, sep="\n  ")
    return int(bool(wrong))


def check_advisories() -> int:
    command = [sys.executable, "-m", "pip_audit", "-r", str(ROOT / "constraints.txt")]
    command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return not_done(done.stderr.strip().splitlines()[-1:] or ["pip-audit gave no answer"])
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    weak = [f"{one['name']} {v['id']}" for one in packages for v in one.get("vulns", ())]
    if len(skipped) == len(packages):
        return not_done(["no package could be looked up"])
    print(f"{len(packages) - len(skipped)} of {len(packages)} packages asked after", end="")
    print(f"; not found: {', '.join(skipped)}" if skipped else "")
    for line in weak:
        print(f"known weakness: {line}")
    return int(bool(weak))


def not_done(why: list[str]) -> int:
    print(f"NOT AUDITED: the advisories of PyPI could not be asked ({why[0]})", file=sys.stderr)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    checks = {"licences": check_licences, "advisories": check_advisories}
    parser.add_argument("what", choices=checks)
    sys.exit(checks[parser.parse_args().what]())


if __name__ == "__main__":
    main()
