"""From a finished study to its page: seconds, bytes, how a browser takes it, and pictures of it.

`python benchmarks/report.py FOLDER` reads the newest study in a folder of studies, writes
`benchmarks/results/report.json` and the pictures `docs/figures/report-*.png`. Needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import run_facts
from PIL import Image

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs/figures"
RESULT = ROOT / "benchmarks/results/report.json"
SHOTS = {
    "light": ("header, #front", 1100, 1000, "light"),
    "dark": ("#edit, #search", 1100, 1500, "dark"),
    "directions": ("#directions", 1100, 1000, "light"),
    "responses": ("#responses", 1100, 800, "light"),
    "phone": ("header, #result, #front", 390, 1600, "light"),
    "print": ("header, #result, #front, #search", 794, 1123, "print"),
}
"""Picture -> parts of the page that are shown, width, height, colour scheme.

`print` is a sheet of A4 as someone sees it who reads in the dark."""
POLICY = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
"""What is left out of copies of the page that have a script or a style more."""
BLINK_SCHEME = {"dark": 0, "light": 1, "print": 0}
COLOURS = 128
"""Of a picture: charts and text need no more."""


def chromium(address: str, folder: Path, *flags: str) -> str:
    """Run headless Chromium on an address; what it prints."""
    names = (os.environ.get("CHROMIUM") or "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        sys.exit("Chromium is not installed; the variable CHROMIUM names another one")
    shared = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command = [program, *shared, f"--user-data-dir={folder / 'profile'}", *flags, address]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report_seconds(studies: Path, page: Path, times: int) -> dict[str, object]:
    """How long the command takes, start of Python included: by the clock and of the processor."""
    command = [sys.executable, "-m", "heretic_kl", "report", str(studies), "-o", str(page)]
    clock, processor = [], []
    for _ in range(times):
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        clock.append(time.perf_counter() - begun)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        processor.append(used)
    return {
        "load_average": os.getloadavg()[0],
        "clock_median": statistics.median(clock),
        "processor_median": statistics.median(processor),
        "clock": clock,
        "processor": processor,
    }


def opening_seconds(page: Path, folder: Path) -> float:
    """From the navigation to the end of the load event, in a page that is like any other."""
    timed = re.sub(POLICY, "", page.read_text("utf-8"))
    script = """<script>addEventListener("load", () => setTimeout(() => {
        const entry = performance.getEntriesByType("navigation")[0];
        document.body.dataset.ms = entry.loadEventEnd - entry.startTime; }))</script></body>"""
    before, _, after = timed.rpartition("</body>")
    copy = folder / "timed.html"
    copy.write_text(before + script + after, encoding="utf-8")
    dom = chromium(f"file://{copy}", folder, "--timeout=30000", "--dump-dom")
    return float(re.findall(r'data-ms="([\d.]+)"', dom)[0]) / 1000


def picture(page: Path, folder: Path, name: str) -> int:
    """One picture with few colours; its size in bytes.

    A frame gives the page its width: a window of Chromium cannot be as narrow as a phone.
    """
    parts, width, height, scheme = SHOTS[name]
    inner = folder / f"{name}-inner.html"
    rest = f"<style>:is(header, section, footer):not({parts}) {{ display: none }}</style></head>"
    text = re.sub(POLICY, "", page.read_text("utf-8")).replace("</head>", rest, 1)
    if scheme == "print":
        begin = '<script>dispatchEvent(new Event("beforeprint"))</script></body>'
        text = begin.join(text.replace("@media print", "@media all").rsplit("</body>", 1))
        text = text.replace("</head>", "<style>html { margin: 3rem }</style></head>", 1)
    inner.write_text(text, encoding="utf-8")
    frame = f'<iframe src="{inner.name}" width="{width}" height="{height}"></iframe>'
    style = "<style>body{margin:0} iframe{border:0;display:block}</style>"
    outer = folder / f"{name}.html"
    outer.write_text(f"<!DOCTYPE html>{style}{frame}", encoding="utf-8")
    shot = folder / f"{name}.png"
    flags = (
        f"--screenshot={shot}",
        f"--window-size={max(width, 600)},{height}",
        f"--blink-settings=preferredColorScheme={BLINK_SCHEME[scheme]}",
        "--virtual-time-budget=3000",
    )
    chromium(f"file://{outer}", folder, *flags)
    target = FIGURES / f"report-{name}.png"
    with Image.open(shot) as image:
        cut = image.convert("RGB").crop((0, 0, width, height))
        cut.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            target, optimize=True
        )
    return target.stat().st_size


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", type=Path)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "report.html"
        seconds = report_seconds(arguments.studies, page, arguments.times)
        result = {
            **run_facts(0, 1, "float32", "optuna", "vl-convert-python", "jinja2"),
            "trials": len(re.findall(r'id="trial-\d+"', page.read_text("utf-8"))),
            "report_seconds": seconds,
            "report_bytes": page.stat().st_size,
            "opening_seconds": opening_seconds(page, folder),
            "picture_bytes": {shot: picture(page, folder, shot) for shot in SHOTS},
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
