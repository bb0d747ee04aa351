"""The page in a real browser: nothing fails, pictures and curves are drawn, and the controls do what they say."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from made_runs import score, smooth_grid, stats_line, write_run

from stylepipe.report import server
from stylepipe.report.page import make_report, render
from stylepipe.report.server import LiveReport, make_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

# Before the page's own scripts: what goes wrong anywhere.
LISTENERS = """
<script>
const wrong = [];
addEventListener("error", (event) => wrong.push(`error: ${event.message}`));
addEventListener("unhandledrejection", (event) => wrong.push(`rejection: ${event.reason}`));
document.addEventListener("securitypolicyviolation", (event) => wrong.push(`policy: ${event.blockedURI}`));
const sayError = console.error;
console.error = (...words) => { wrong.push(`console: ${words}`); sayError(...words); };
</script>
"""

# Behind them: helpers, then what a test asks for, then its outcome as text in the page.
PROBE = """
<script>
(async () => {
  const find = (what) => document.querySelector(what), all = (what) => [...document.querySelectorAll(what)];
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const press = (key) => {
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  };
  const set = (what, value) => { find(what).value = value; find(what).dispatchEvent(new Event("input")); };
  const slide = (place) => set("#moment", place);
  const picture = () => find(".generated img").src;
  const drawn = async (img) => {  // whether its pixels differ
    for (let i = 0; i < 100 && !img.complete; i++) await wait(20);  // decode() is not waited for by virtual time
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [16, 16];
    const context = canvas.getContext("2d");
    context.drawImage(img, 0, 0, 16, 16);
    return new Set(context.getImageData(0, 0, 16, 16).data).size > 8;
  };
  const curves = () => all(".chart path.curve").map((path) => {
    const box = path.getBBox(), points = (path.getAttribute("d").match(/[ML]/g) || []).length;
    return { name: path.dataset.name, points, width: box.width, height: box.height };
  });
  const chart = (title) => all(".chart").find((one) => one.querySelector("h3").textContent === title);
  const point = (kind, svg, share, buttons = 0) => {
    const box = svg.getBoundingClientRect(), clientX = box.left + box.width * share, clientY = box.top + 50;
    svg.dispatchEvent(new PointerEvent(kind, { clientX, clientY, buttons, bubbles: true }));
  };
  const told = {};
  try { await (async () => { ASKED })(); } catch (error) { wrong.push(`probe: ${error.stack}`); }
  told.wrong = wrong;
  told.asked = performance.getEntriesByType("resource").map((entry) => entry.name);
  told.asked = told.asked.filter((name) => !name.startsWith("data:"));
  const textContent = JSON.stringify(told);
  document.body.append(Object.assign(document.createElement("pre"), { id: "outcome", textContent }));
})();
</script>
"""


def probed(page: str, asked: str) -> str:
    """Add the probe to a page."""
    head = page.replace("<style>", LISTENERS + "<style>", 1)
    return head.replace("</body>", PROBE.replace("ASKED", asked) + "</body>", 1)


def outcome(tmp_path: Path, address: str, *flags: str) -> dict[str, Any]:
    """Open an address and return what its probe found."""
    assert CHROMIUM
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900", "--virtual-time-budget=120000"),
        *(*flags, "--dump-dom", address),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def open_report(tmp_path: Path, folders: list[Path], asked: str, *flags: str) -> dict[str, Any]:
    """Write the page of runs and probe it; it must have done so without fault and without a request."""
    path = tmp_path / "probed.html"
    path.write_text(probed(render(make_report(folders, 4_000_000)), asked))
    told = outcome(tmp_path, path.as_uri(), *flags)
    assert told["wrong"] == []
    assert told["asked"] == []
    return told


def test_one_run(tmp_path: Path) -> None:
    stats = [
        stats_line(
            i * 10,
            Loss__G__adversarial=None if 100 < i < 150 else 1 + (i % 7),
            Loss__D__r1=1 / i,
            Progress__augment_p=i / 300,
            Timing__sec_per_kimg=5.0 + i % 3,
            New__thing=(i % 11) - 5,
            still=3,
            **({"Alarm__mode_collapse": "mode collapse: look at the grid"} if i == 200 else {}),
        )
        for i in range(1, 301)
    ]
    scores = [score(s, v) for s, v in ((1000, 5.0), (2000, 2.0), (3000, 3.0))] + [score(2000, 9.0, truncation_psi=0.5)]
    folder = write_run(tmp_path / "<b>run", stats=stats, scores=scores)
    told = open_report(
        tmp_path,
        [folder],
        """
        told.title = find("h1").textContent;
        told.curves = curves();
        told.real = await drawn(find(".real img"));
        told.moments = [];
        for (const place of [3, 0, 2]) {
          slide(place);
          const seen = await drawn(find(".generated img"));
          told.moments.push([find("#kimg").textContent, picture().length, seen, find(".badge").textContent]);
        }
        told.pictures = [];
        slide(0);
        for (const key of ["", "ArrowRight", "ArrowRight", "ArrowLeft"]) { press(key); told.pictures.push(picture()); }
        told.kimgByKeys = find("#kimg").textContent;
        slide(0);
        find("#play").click();
        await wait(1000);
        told.playing = find("#kimg").textContent;
        await wait(5000);
        told.played = [find("#kimg").textContent, find("#play").textContent];

        const losses = chart("Losses"), svg = losses.querySelector("svg");
        const path = () => losses.querySelector("path.curve:not(.raw)").getAttribute("d");
        told.gap = (path().match(/M/g) || []).length;
        point("pointermove", svg, 0.9);
        told.tip = losses.querySelector(".tip").innerText;
        const tip = losses.querySelector(".tip").getBoundingClientRect(), frame = losses.getBoundingClientRect();
        told.tipInside = tip.left >= frame.left && tip.bottom < frame.bottom;
        told.tipInside &&= tip.right < frame.right - frame.width * 0.1;  // left of the pointer
        told.crosses = all(".cross[visibility=visible]").length;
        point("pointerleave", svg, 0.9);
        const linear = path();
        losses.querySelector("header button").click();
        told.log = path() !== linear;
        losses.querySelector("header button").click();
        losses.querySelector(".legend button").click();
        const legend = losses.querySelector(".legend button");
        told.switched = [losses.querySelectorAll("path.curve").length, legend.getAttribute("aria-pressed")];
        losses.querySelector(".legend button").click();
        told.same = path() === linear;
        set("#smoothing", 0.8);
        told.smoothed = [path() !== linear, losses.querySelectorAll("path.raw").length];
        set("#smoothing", 0);
        point("pointerdown", svg, 0.5, 1); point("pointermove", svg, 0.8, 1); point("pointerup", svg, 0.8);
        told.zoomed = [path() !== linear, find("#unzoom").hidden];
        find("#unzoom").click();
        told.whole = path() === linear;
        point("pointerdown", svg, 0.37, 1); point("pointerup", svg, 0.37);
        told.picked = find("#kimg").textContent;
        find(".generated img").click();
        press("ArrowRight");
        told.large = [find("dialog").open, find("dialog p").textContent, find("dialog img").src === picture()];
        find("dialog img").click();
        told.closed = !find("dialog").open;
        told.alarms = find("#alarms").innerText;
        told.marks = all("svg .event").length;
        told.best = all("svg .best-label").map((one) => one.textContent);
        told.metrics = all("#metrics tbody tr").map((one) => one.innerText);
        told.constant = find("#constant").textContent;
        told.groups = all(".chart h3").map((one) => one.textContent);
        told.wide = document.documentElement.scrollWidth <= innerWidth;
        """,
    )
    assert told["title"] == "<b>run"
    assert {"swd", "swd_64", "G/adversarial", "D/r1", "augment_p", "sec_per_kimg", "thing"} <= {
        c["name"] for c in told["curves"]
    }
    assert all(
        curve["points"] > 200 and curve["width"] > 200
        for curve in told["curves"]
        if not curve["name"].startswith("swd")
    )
    assert told["real"]
    shown = told["moments"]
    assert [moment[0] for moment in shown] == ["3 kimg", "0 kimg", "2 kimg"]
    assert all(moment[2] for moment in shown)
    assert [moment[3] for moment in shown] == ["", "", "★ best swd"]
    a, b, c, d = told["pictures"]
    assert len({a, b, c}) == 3
    assert b == d
    assert told["kimgByKeys"] == "1 kimg"
    assert told["playing"] in ("1 kimg", "2 kimg")
    assert told["played"] == ["3 kimg", "▶ play"]
    assert told["gap"] == 2, "the line breaks where values were not finite"
    assert re.search(r"kimg\s+G/adversarial\s+\d", told["tip"])
    assert told["tipInside"]
    assert told["crosses"] == len(told["groups"])
    assert told["log"]
    assert told["same"]
    assert told["switched"] == [1, "false"]
    assert told["smoothed"] == [True, 2]
    assert told["zoomed"] == [True, False]
    assert told["whole"]
    assert told["picked"] == "1 kimg"
    assert told["large"] == [True, "<b>run, 2 kimg, best swd", True]
    assert told["closed"]
    assert "2 kimg mode collapse: look at the grid" in told["alarms"]
    assert told["marks"] == len(told["groups"])
    assert told["best"] == ["best 2 at 2", "best 9 at 2"]
    assert [re.split(r"\s{2,}|\t|\n", row)[0].partition(",")[0] for row in told["metrics"]] == ["swd", "swd"]
    assert "truncation_psi 0.5" in told["metrics"][1]
    assert told["constant"] == "The same throughout: still 3."
    assert told["groups"] == ["swd", "swd", "Losses", "Augmentation", "Time", "New"]
    assert told["wide"]


@pytest.mark.slow
def test_several_runs_and_a_narrow_window(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "x/run", scores=[score(1000, 3.0), score(2000, 2.5)]),
        write_run(tmp_path / "y/run", moments=(0, 500, 2500), scores=[score(1000, 1.0)], config={"seed": 1}),
        write_run(tmp_path / "fresh", moments=(), stats=[]),
    ]
    told = open_report(
        tmp_path,
        folders,
        """
        told.steps = Number(find("#moment").max);
        slide(2);
        told.where = find("#kimg").textContent;
        told.captions = all(".generated figcaption").map((one) => one.innerText);
        told.waiting = all(".nothing").length;
        told.real = all(".real").length;
        const loss = chart("G/adversarial"), paths = [...loss.querySelectorAll("path.curve")];
        told.names = paths.map((one) => one.dataset.name);
        told.colors = new Set(paths.map((one) => getComputedStyle(one).stroke)).size;
        loss.querySelector(".legend button").click();
        told.left = all("path.curve").map((one) => one.dataset.name).filter((name) => name === "x/run").length;
        told.winners = all("td.winner").map((one) => one.textContent);
        told.differences = all("#differences tbody tr").map((one) => one.innerText);
        told.wide = document.documentElement.scrollWidth <= innerWidth;
        """,
        "--window-size=500,900",
    )
    assert told["steps"] == 5, "0, 0.5, 1, 2, 2.5, 3 kimg"
    assert told["where"] == "1 kimg"
    assert re.sub(r"\s+", " ", told["captions"][0]).strip().startswith("x/run 1 kimg")
    assert re.sub(r"\s+", " ", told["captions"][1]).strip().startswith("y/run 0.5 kimg")
    assert (told["waiting"], told["real"]) == (1, 1)
    assert told["names"] == ["x/run", "y/run"]
    assert told["colors"] == 2
    assert told["left"] == 0, "a run is switched off in all charts"
    assert told["winners"] == ["1"]
    assert [row.split() for row in told["differences"]] == [["seed", "0", "1", "0"]]
    assert told["wide"]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/stats.jsonl").touch()
    told = open_report(tmp_path, [tmp_path / "new"], "told.text = document.body.innerText; press('ArrowRight');")
    assert "no grid yet" in told["text"]
    assert "No statistics yet" in told["text"]
    assert "config.yaml: not there" in told["text"]


@pytest.mark.slow
def test_hostile_texts_run_nothing(tmp_path: Path) -> None:
    hostile = "</script><script>wrong.push('ran')</script><img src=x onerror=\"wrong.push('ran')\">"
    folder = write_run(
        tmp_path / "<img src=x onerror=wrong.push('ran')>",
        config={"preset": hostile},
        stats=[stats_line(i, **{f"Loss__{hostile}": i, "__proto__": i, "Alarm__x": hostile}) for i in (1, 2, 3)],
        scores=[score(1000, 1.0, metric=hostile, note=hostile), score(1000, 1.0, metric=hostile)],
    )
    (folder / "log.txt").write_text(hostile)
    other = write_run(tmp_path / "b", config={hostile: hostile})
    for folders in ([folder], [folder, other]):
        told = open_report(
            tmp_path,
            folders,
            """
            point("pointermove", find(".chart svg"), 0.5);
            told.text = document.body.textContent;
            told.n = all("main img").length;
            """,
        )
        assert hostile in told["text"]
        assert told["n"] <= 5


@pytest.mark.slow
def test_a_served_page_follows_the_run_and_keeps_its_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "r")

    class Writing(LiveReport):
        """After a page was made the run goes on; looking waits, as the browser's time runs faster than ours."""

        def look(self) -> None:
            before = self.report
            self._refresh()
            if before is None:
                smooth_grid(16, 50).save(folder / "grids/000004.000.png")
                with open(folder / "stats.jsonl", "a") as file:
                    file.write(stats_line(4000, Loss__G__adversarial=7.0, Loss__D__adversarial=1.0))

    asked = """
        slide(1);
        find(".chart .legend button").click();
        find(".chart header button").click();
        set("#smoothing", 0.5);
        all("details")[1].open = true;
        const state = () => [
          find("#kimg").textContent, find("#moment").value, find(".legend button").getAttribute("aria-pressed"),
          find(".chart header button").textContent, find("#smoothing").value, all("details")[1].open,
        ];
        told.before = state();
        told.first = [find("#moment").max, find("header").innerText];
        for (let i = 0; i < 100 && find("#moment").max === "3"; i++) await wait(500);
        told.after = state();
        told.last = [find("#moment").max, find("header").innerText];
        press("ArrowRight"); press("ArrowRight"); press("ArrowRight");
        told.newest = [find("#kimg").textContent, await drawn(find(".generated img"))];
    """
    monkeypatch.setattr(server, "render", lambda report, live: probed(render(report, live), asked))
    live = Writing([folder], 4_000_000)
    live.look()
    web = make_server(live, 0)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    try:
        told = outcome(tmp_path, f"http://127.0.0.1:{web.server_address[1]}/")
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
    assert told["wrong"] == []
    assert all(name.startswith(f"http://127.0.0.1:{web.server_address[1]}/") for name in told["asked"])
    assert told["before"] == told["after"] == ["1 kimg", "1", "false", "log", "0.5", True]
    assert told["first"][0] == "3"
    assert "3 of 4 kimg" in told["first"][1]
    assert told["last"][0] == "4"
    assert "4 of 4 kimg" in told["last"][1]
    assert told["newest"] == ["4 kimg", True]
