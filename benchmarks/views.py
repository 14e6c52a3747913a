"""How large the report's page is, and how soon the dashboard answers its reader.

Run ``python -m benchmarks.views``; writes ``benchmarks/results/views.md``. Pages are those of `compare` with
two policies on synthetic traffic: their size depends on layers, devices and windows, hardly on the policies.
The explorer shows a placement of 58 layers and 864 slots on 288 devices (50,112 slots) with the loads of a
trace, in headless Chromium on a service of its own; a time counts from the input event to the second frame
after it, when the new picture is on the screen. Wanted: pages under 2 MB, interactions under 100 ms.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from playwright.sync_api import Page, sync_playwright

from benchmarks.environment import RESULTS, environment
from placement import LinearCalibration, compare, make_problem, parse_topology
from placement.plan import equal_slots
from placement.report import render_report
from service.client import Client
from service.local import LocalService
from traces import build_profile
from traces.synthesize import synthesize

__all__ = ["main"]

SEED = 0
MOST_BYTES, MOST_MS = 2_000_000, 100.0
REPEATS = 25
LAYERS, EXPERTS, DEVICES, SLOTS = 58, 256, 288, 864

WATCH = """(type) => {
    window.taken = new Promise((resolve) => addEventListener(type, (event) => {
        const began = event.timeStamp;
        requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - began)));
    }, { once: true, capture: true }));
}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a page shows."""

    layers: int
    experts: int
    slots: int
    topology: str
    windows: int


SHAPES = (
    Shape(layers=6, experts=16, slots=16, topology="h100:1x8", windows=64),
    Shape(layers=58, experts=256, slots=288, topology="h100:4x8", windows=32),
    Shape(layers=94, experts=160, slots=192, topology="h100:8x8", windows=32),
    Shape(layers=94, experts=160, slots=192, topology="h100:8x8", windows=128),
)


def page_of(shape: Shape) -> tuple[int, float]:
    """Return bytes of a report's page, and seconds that it takes to be written."""
    window_tokens = 256
    trace = synthesize(
        num_tokens=shape.windows * window_tokens,
        num_layers=shape.layers,
        num_experts=shape.experts,
        top_k=8 if shape.experts > 16 else 2,
        seed=SEED,
    )
    topology = parse_topology(shape.topology)
    problem = make_problem(
        build_profile(trace, window_tokens=window_tokens),
        topology,
        calibration=LinearCalibration(pair_cost=1, token_cost=4),
        device_of_slot_S=equal_slots(shape.slots, topology.num_devices),
    )
    comparison = compare(problem, only=("contiguous", "eplb"))
    began_s = time.perf_counter()
    page = render_report(comparison)
    return len(page.encode()), time.perf_counter() - began_s


def large_placement(*, exchanged: bool) -> bytes:
    """Return a placement of 50,112 slots; `exchanged`: two of each layer swapped."""
    rng = np.random.default_rng(SEED)
    rows = [rng.permutation(EXPERTS)[np.arange(SLOTS) % EXPERTS].tolist() for _ in range(LAYERS)]
    if exchanged:
        for row in rows:
            row[0], row[-1] = row[-1], row[0]
    document = {
        "format": "moe-placement/1",
        "physical_to_logical_map": rows,
        "device_of_slot": (np.arange(SLOTS) * DEVICES // SLOTS).tolist(),
        "num_experts": EXPERTS,
        "num_devices": DEVICES,
    }
    return json.dumps(document).encode()


def timed_ms(page: Page, event: str, act: Callable[[int], None]) -> list[float]:
    """Return how long an interaction takes until its picture is there, several times."""
    taken = []
    for count in range(REPEATS):
        page.evaluate(WATCH, event)
        act(count)
        taken.append(float(page.evaluate("() => window.taken")))
    return taken


def interactions(page: Page, first: str) -> Iterator[tuple[str, list[float]]]:
    """Point, press keys, find an expert, compare; yield what was done and how long it took."""
    grid = page.locator("#grid")
    box = grid.bounding_box()
    assert box is not None
    left, top = box["x"], box["y"]

    def point(count: int) -> None:
        page.mouse.move(left + 80 + 20 * (count % 20), top + 60 + 13 * (count % 17))

    yield "pointing at a cell", timed_ms(page, "pointermove", point)
    grid.focus()
    yield "next device by key", timed_ms(page, "keydown", lambda _: page.keyboard.press("ArrowRight"))
    yield "next layer by key", timed_ms(page, "keydown", lambda _: page.keyboard.press("ArrowDown"))
    page.get_by_label("Find expert").focus()
    yield "finding an expert", timed_ms(page, "input", lambda count: page.keyboard.press(str(count % 2)))
    page.get_by_label("Find expert").fill("")
    page.locator("#from").select_option(first)
    page.locator("#num-moves").get_by_text("moves").wait_for()
    compared = page.evaluate("() => performance.getEntriesByName('grid:compare').map((one) => one.duration)")
    yield "comparing two placements, once both are there", [float(one) for one in compared]
    grid.focus()
    yield (
        "next device by key, compared",
        timed_ms(page, "keydown", lambda _: page.keyboard.press("ArrowLeft")),
    )


def explorer(browser: str) -> list[tuple[str, list[float]]]:
    """Measure the explorer on a service of its own."""
    with tempfile.TemporaryDirectory() as folder, LocalService() as service:
        trace = synthesize(num_tokens=512, num_layers=LAYERS, num_experts=EXPERTS, top_k=8, seed=SEED)
        path = Path(folder) / "trace.npz"
        np.savez(path, topk=trace.experts_TLK.astype(np.uint16), num_experts=np.int64(EXPERTS))
        with Client(service.url) as client:
            uploaded = client.upload_trace(path).id
            first, second = (
                client.upload_placement(large_placement(exchanged=exchanged)) for exchanged in (False, True)
            )
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"{service.url}/#/placements/{second}?trace={uploaded}")
            page.locator("main[data-view=placement][data-ready=true]").wait_for()
            page.locator(f"#from option[value='{first}']").wait_for(state="attached")
            found = list(interactions(page, first))
            chromium.close()
    return found


def table(pages: list[tuple[Shape, int, float]], found: list[tuple[str, list[float]]]) -> str:
    """Return the results as Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in environment().items())
    lines = ["# Pages and the dashboard", "", (__doc__ or "").split("\n\n", 1)[1].strip(), "", about, ""]
    lines += ["| layers | experts | slots | topology | windows | page MB | under 2 MB | written in s |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for shape, num_bytes, seconds in pages:
        met = "met" if num_bytes < MOST_BYTES else "**missed**"
        lines.append(
            f"| {shape.layers} | {shape.experts} | {shape.slots} | {shape.topology} "
            f"| {shape.windows // 2} held out | {num_bytes / 1e6:.2f} | {met} | {seconds:.2f} |"
        )
    lines += ["", "| explorer of 50,112 slots | median ms | largest ms | under 100 ms |", "|---|---|---|---|"]
    for what, taken in found:
        met = "met" if max(taken) < MOST_MS else "**missed**"
        lines.append(f"| {what} | {median(taken):.0f} | {max(taken):.0f} | {met} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.views", description=__doc__)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="Chromium's program")
    arguments = parser.parse_args()
    if arguments.browser is None:
        parser.error("there is no chromium; install it, or name it with --browser")
    pages = [(shape, *page_of(shape)) for shape in SHAPES]
    text = table(pages, explorer(arguments.browser))
    (RESULTS / "views.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
