"""Runs the checks of `parts`, each in a process of its own with a time limit: see smoke.sh.

Writes smoke.json, with the state of each part (ok, failed, skipped, timeout, not reached), its seconds and its rows,
and prints a table. Exit code 0 only if no part failed. `--part K/N` runs the K-th of N groups of parts, so that other
calls can run what one call could not reach. `--small` shortens all parts, so that they can be tried on a CPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 480.0  # seconds in all
SLOWER = 3  # how much longer a part in its small form may take, which runs on a CPU
LEAST = 20.0  # seconds; a part is not started with less
PARTS = {  # in the order of their value: seconds at most
    "quickstart": 110,
    "resume": 60,
    "zero": 60,
    "speed": 100,
    "recipes": 100,
    "export": 40,
}
ROOT = Path(__file__).parents[2]
STATES = {0: "ok", 3: "skipped"}  # of exit codes; all others: failed


def run(name: str, given: argparse.Namespace, seconds: float) -> dict[str, object]:
    """One part, in its own process. Returns its state, seconds and rows."""
    out, began = given.out / name, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    options = ["--small"] if given.small else []
    command = [sys.executable, "-m", "tests.gpu.parts", name, str(out), "--device", given.device, *options]
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            state = STATES.get(process.wait(seconds), "failed")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            state = "timeout"
    rows, file = [], out / "rows.json"
    if file.is_file():
        rows = json.loads(file.read_text())
    last = (out / "log.txt").read_text(errors="replace").strip().splitlines()
    why = "" if state == "ok" or not last else last[-1][:300]
    return {"state": state, "seconds": round(time.monotonic() - began, 1), "why": why, "rows": rows}


def table(found: dict[str, dict[str, object]]) -> str:
    lines = []
    for name, part in found.items():
        lines.append(f"{name:<12} {part['state']:<12} {part['seconds']:>7} s  {part['why']}")
        assert isinstance(part["rows"], list)
        for row in part["rows"]:
            verdict = {None: "", True: "ok", False: "NOT OK"}[row["ok"]]
            lines.append(f"    {row['what']:<58} {row['value']:<26} {verdict}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--part", default="1/1", metavar="K/N")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "smoke")))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in PARTS]:
        parser.error(f"unknown parts: {', '.join(unknown)}; valid: {', '.join(PARTS)}")
    part = re.fullmatch(r"(\d+)/(\d+)", given.part)
    number, count = (int(part[1]), int(part[2])) if part else (0, 0)
    if not 1 <= number <= count:
        parser.error(f"--part {given.part}: give K/N with K from 1 to N")
    given.out = given.out.absolute()
    chosen = [name for name in PARTS if not given.names or name in given.names][number - 1 :: count]
    began, found = time.monotonic(), {}
    for name in chosen:
        left = given.limit - (time.monotonic() - began)
        if left < LEAST:
            found[name] = {"state": "not reached", "seconds": 0.0, "why": f"run: {name}", "rows": []}
            continue
        print(f"{name} ...", flush=True)
        found[name] = run(name, given, min(left, PARTS[name] * (SLOWER if given.small else 1)))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "smoke.json").write_text(json.dumps(found, indent=2))
    print(table(found))
    bad = [name for name, part in found.items() if part["state"] in ("failed", "timeout")]
    wrong = [name for name, part in found.items() if any(row["ok"] is False for row in part["rows"])]
    sys.exit(1 if bad or wrong else 0)


if __name__ == "__main__":
    main()
