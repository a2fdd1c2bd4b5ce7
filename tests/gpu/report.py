"""Runs parts, each within its limit, and keeps one JSON and one Markdown file of what they have said."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.kit import ROOT

TAIL = 3000
"""Characters that are kept of what a part that failed has printed."""


class Part(NamedTuple):
    """Commands that run at the same time for at most `limit` seconds; the last line of each may be a JSON object."""

    name: str
    commands: list[list[str]]
    limit: float


def run_parts(parts: Sequence[Part], folder: Path, device: str) -> int:
    """Run all; return 0 if each part ended well and each bar that is judged holds, else 1."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(device), "parts": [], "bars": []}
    for part in parts:
        print(f"{part.name} ...", flush=True)
        results["parts"].append(run_part(part))
        results["bars"] = bars(results)
        for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", page(results))):
            new = folder / f".{name}"
            new.write_text(text + "\n")
            new.replace(folder / name)
    print(page(results))
    is_good = all(part["result"] == "ok" for part in results["parts"])
    return int(not (is_good and all(bar["holds"] is not False for bar in results["bars"])))


def machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_part(part: Part) -> dict[str, Any]:
    """Return the name, the result ("ok", "failed" or "out of time"), seconds, and what the part has said."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(number) for number in range(len(part.commands))]
        started = []
        for command, file in zip(part.commands, files, strict=True):
            with file.open("w") as output:
                started.append(
                    subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                )
        is_late = False
        for process in started:
            try:
                process.wait(max(0.0, begin + part.limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                is_late = True
        for process in started:  # and what they have started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = [file.read_text(errors="replace") for file in files]
    is_good = all(process.returncode == 0 for process in started) and not is_late
    return {
        "name": part.name,
        "result": "ok" if is_good else "out of time" if is_late else "failed",
        "seconds": round(time.monotonic() - begin, 1),
        "limit": part.limit,
        "commands": [" ".join(command).replace(sys.executable, "python3") for command in part.commands],
        "found": [last_json(text) for text in texts],
        "last_lines": [(text.strip().splitlines() or [""])[-1] for text in texts],
        "output": [] if is_good else [text[-TAIL:] for text in texts],
    }


def last_json(text: str) -> Any:
    """Return the last line that is a JSON object; None without one."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):
                return json.loads(line)
    return None


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bars, with what was found: `holds` is None if nothing was, or if a CPU cannot tell."""
    found = {part["name"]: part["found"][0] for part in results["parts"] if part["found"][0]}
    sizes = found.get("speed and memory", {})
    judges = results["machine"]["device"] != "cpu"
    rows = []
    for size, contenders in sizes.items():
        for name, row in contenders.items():
            if name.startswith("Tally") and size == "GPT-2":
                plain = contenders["plain loop, compiled" if name.endswith("compiled") else "plain loop"]
                speed = row["tokens_per_second"] / plain["tokens_per_second"]
                rows.append((f"{size}, {name}: tokens/s of the plain loop >= 0.99", round(speed, 4), speed >= 0.99))
                if row["peak_mib"]:
                    memory = row["peak_mib"] / plain["peak_mib"]
                    rows.append((f"{size}, {name}: peak memory <= 1.01", round(memory, 4), memory <= 1.01))
    if syncs := found.get("host-device syncs per update"):
        rows.append(("as many host-device syncs per update at K=64 as at K=8", str(syncs), syncs["8"] == syncs["64"]))
    return [{"bar": text, "found": value, "holds": holds if judges else None} for text, value, holds in rows]


def page(results: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(results["machine"]) + " |", "| " + " | ".join("---" for _ in results["machine"]) + " |"]
    lines += ["| " + " | ".join(str(value) for value in results["machine"].values()) + " |", ""]
    lines += ["| part | result | seconds (limit) | last line |", "| --- | --- | --- | --- |"]
    for part in results["parts"]:
        says = "; ".join("" if line.startswith("{") else line.replace("|", "/")[:100] for line in part["last_lines"])
        lines.append(f"| {part['name']} | {part['result']} | {part['seconds']} ({part['limit']}) | {says} |")
    if results["bars"]:
        lines += ["", "| bar | found | holds |", "| --- | --- | --- |"]
        said = {True: "yes", False: "NO", None: "not judged"}
        lines += [f"| {bar['bar']} | {bar['found']} | {said[bar['holds']]} |" for bar in results["bars"]]
    for part in results["parts"]:
        for found in part["found"]:
            if found:
                lines += ["", *table(part["name"], found)]
        for text in part["output"]:
            lines += ["", f"`{part['name']}` printed:", "", "```text", text.replace("```", "'''"), "```"]
    return "\n".join(lines)


def table(name: str, found: dict[str, Any]) -> list[str]:
    """Return a table of contenders, or a list of names and values."""
    lines = [f"**{name}**", ""]
    for key, value in found.items():
        if not isinstance(value, dict):
            lines.append(f"- {key}: {value}")
            continue
        columns = list(next(iter(value.values())))
        lines += [f"| {key} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        lines += [f"| {row} | " + " | ".join(str(v) for v in cells.values()) + " |" for row, cells in value.items()]
        lines.append("")
    return lines
