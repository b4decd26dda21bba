"""The page of a report: a hundred contracts at a glance, each of which opens, in a browser and without scripts."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gaugeblock.conformance.engine.judging.verdict import FAILED, Verdict
from gaugeblock.conformance.report import overview, page, view
from tests.synthetic_report import ENVIRONMENT, contract_names, verdicts

BROWSERS = ("chromium", "google-chrome")
# No connection of the browser's own: the machine that tests may have no network, and the page must need none.
OFFLINE = (
    *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split(),
    *"--disable-component-update --disable-sync --window-size=1280,900 --host-resolver-rules=MAP~*~~NOTFOUND".split(),
)
MANY, DEVICES = 12, ("cpu", "cuda")
MOST_BYTES = 16e6  # of a page of 60,000 verdicts
MOST_NODES = 20_000  # of which there would be 250,000 if nothing were left for later
SECONDS = {"load": 10, "search": 1, "open": 3}  # also where many use the machine; measured on two cores: 0.9, 0.02 and 0.13

# What the page does, told as JSON in place of the page.
PROBE = """
<script>
const answer = {errors: []};
addEventListener("error", event => answer.errors.push(event.message));
const timed = task => {
  const start = performance.now();
  task();
  document.body.offsetHeight;  // lays the page out
  return (performance.now() - start) / 1000;
};
const shown = () => rows.filter(each => !each.row.hidden).map(each => each.row.cells[0].textContent);
const set = values => { form.reset(); for (const name in values) form.elements[name].value = values[name]; filter(); };
%s
document.body.innerHTML = "<pre id=answer></pre>";
document.getElementById("answer").textContent = JSON.stringify(answer);
if (parent !== window) parent.postMessage(JSON.stringify(answer), "*");
</script>
"""
NARROW = """<!doctype html><body><iframe width="390" height="800" src="page.html"></iframe>
<script>addEventListener("message", event => { document.body.innerHTML = "<pre id=answer></pre>";
document.getElementById("answer").textContent = event.data; });</script>"""


def ask(folder: Path, text: str, program: str, narrow: bool = False) -> dict[str, Any]:
    """What a program run at the end of the page answers."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:  # `make test` installs one where it can
        pytest.skip(f"NOT TESTED: the page in a browser, for there is none of {BROWSERS}: apt-get install chromium")
    (folder / "page.html").write_text(text.replace("</body>", f"{PROBE % program}</body>"))
    (folder / "narrow.html").write_text(NARROW)
    address = (folder / ("narrow.html" if narrow else "page.html")).as_uri()
    options = [each.replace("~", " ") for each in OFFLINE] + (["--virtual-time-budget=20000"] if narrow else [])
    command = [browser, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer: dict[str, Any] = json.loads(done.stdout.partition('<pre id="answer">')[2].partition("</pre>")[0])
    assert answer["errors"] == []
    return answer


@pytest.fixture(scope="module")
def many() -> list[Verdict]:
    return verdicts(MANY, devices=DEVICES, broken=0.05)


@pytest.fixture(scope="module")
def text(many: list[Verdict]) -> str:
    return page.render(many, ENVIRONMENT, "quick")


class Reader(HTMLParser):
    """What a browser without JavaScript shows: the text of each cell, row by row, and where each row belongs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if href := found.get("href"):
            self.links.add(href)
        if name := found.get("id"):
            self.ids.add(name)

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def test_the_overview_has_a_cell_for_each_implementation_of_each_contract(many, text):
    rows = {row[0]: row[1:] for row in Reader(text.partition("What fails, and why")[0]).rows if row}
    for contract in contract_names(MANY):
        mine = [each for each in many if each.contract == contract]
        subjects = {(each.implementation, each.device) for each in mine}
        cells = [cell for cell in rows[contract] if cell]
        assert len(cells) == len(subjects) == 8 * len(DEVICES)
        broken = {(each.implementation, each.device) for each in mine if each.status in FAILED}
        assert sum(cell[0] in "✗☠" for cell in cells) == len(broken)


def test_a_cell_tells_the_worst_status_and_the_worst_error(many):
    matrices = view.matrices(many)
    tiles = [tile for row in overview.overview(matrices).rows for tile in row.tiles if tile]
    for tile in tiles:
        mine = [
            each for matrix in matrices for each in matrix.cells.values() if matrix.contract == tile.verdicts[0].contract
            and (each.implementation, each.device) == (tile.block.implementation, tile.block.device)
        ]  # fmt: skip
        assert {each.identity for each in mine} == {each.identity for each in tile.verdicts}
        assert view.WORST_FIRST.index(tile.status) == min(view.WORST_FIRST.index(each.status) for each in mine)
        if tile.status == "pass":
            worst = max(each.worst for each in mine if each.worst is not None)
            assert tile.text() == f"✓ {view.units(worst)}" and view.units(worst) in tile.told
        elif tile.status in FAILED:
            assert set(tile.failing) <= set(tile.told.replace(",", "").replace(";", "").split())
    assert {tile.status for tile in tiles} >= {"pass", "fail", "crash"}


def test_implementations_that_no_contract_has_together_share_a_column():
    found = overview.overview(view.matrices(verdicts(30))).columns
    assert [(each.kind, each.title) for each in found] == [
        ("reference", "reference"), ("reference", "reference-jax"), ("triton", "triton"), ("distributed", "expert-parallel"),
        ("jax", ""), ("compiled", "compiled"), ("user", "another_vendors_kernel-v2"), ("user", "mychip"),
    ]  # fmt: skip
    assert len(found[4].names) == 3


def test_every_cell_leads_somewhere_and_no_name_is_cut(text):
    found = Reader(text)
    assert {link[1:] for link in found.links if link.startswith("#")} <= found.ids
    assert len({link for link in found.links if re.fullmatch(r"#[ev]\d+", link)}) > 1000
    cells = {cell for row in found.rows for cell in row}
    assert {*contract_names(MANY), "another_vendors_kernel-v2", "permutation_equivariance"} <= cells


def test_what_is_kept_is_marked_with_its_date_and_commit(many):
    some = [replace(each) for each in many if each.contract == contract_names(MANY)[0]]
    for each in some[::2]:
        vars(each)["kept"] = {"date": "2026-11-20", "commit": "abc1234" * 5}
    found = page.render(some, ENVIRONMENT, "quick")
    kept = len(view.tested(some[::2]))
    assert (
        found.count("<td>kept of 2026-11-20, commit abc1234abc\n") + found.count("; kept of 2026-11-20, commit abc1234abc\n")
        == kept
    )
    assert len(re.findall(r'<td class="(f )?\w+ kept">', found)) == kept
    assert f"not judged again: {kept:,} of {len(view.tested(some)):,} kept of 2026-11-20, commit abc1234abc<" in found
    assert "commit abc" not in page.render(some[1::2], ENVIRONMENT, "quick")


def test_what_applied_to_nothing_is_said(many):
    assert view.nowhere(many) == []
    some = [each for each in many if each.kind == "user"]
    assert view.nowhere(some) == ["masked_lanes", "path_witness", "program_order", "races"]
    assert "Applied to nothing here: masked_lanes, path_witness, program_order, races<" in page.render(some, ENVIRONMENT, "quick")


@pytest.mark.timeout(300)
def test_a_hundred_contracts_are_found_and_opened_at_once(tmp_path):
    text = page.render(verdicts(100), ENVIRONMENT, "quick")
    assert len(text.encode()) < MOST_BYTES
    name = contract_names(100)[57]
    answer = ask(
        tmp_path,
        text,
        f"""
        answer.load = performance.now() / 1000;
        answer.nodes = document.querySelectorAll("*").length;
        answer.wide = document.documentElement.scrollWidth - innerWidth;
        answer.search = timed(() => set({{words: "{name}"}}));
        answer.found = shown();
        set({{}});
        answer.open = timed(() => reveal("{name}"));
        const opened = document.getElementById("{name}");
        answer.cells = opened.querySelectorAll(".grid td a").length;
        answer.filled = document.querySelectorAll(".contract .grid").length;
        """,
    )
    assert answer["found"] == [name] and answer["wide"] <= 0
    assert answer["nodes"] < MOST_NODES
    assert answer["cells"] == 8 * 3 * 25 and answer["filled"] == 1, "the others cost nothing yet"
    assert {key: answer[key] for key in SECONDS if answer[key] > SECONDS[key]} == {}


def test_search_and_filters_go_together(tmp_path, many, text):
    answer = ask(
        tmp_path,
        text,
        """
        for (const [name, values] of Object.entries({
          all: {}, failing: {status: "fail"}, family: {family: "routers"}, none: {words: "no such thing"},
          both: {words: "mychip softmax", family: "routers"}, property: {words: "hidden_state"}, cuda: {device: "cuda"},
          failing_cuda: {status: "fail", device: "cuda"},
        })) { set(values); answer[name] = shown(); }
        set({device: "cuda"});
        answer.columns = [...new Set(heads.filter(each => !each.hidden).map(each => each.dataset.device))];
        answer.spans = kinds.reduce((sum, each) => sum + each.colSpan, 0);
        set({words: "softmax"});
        answer.sections = [...document.querySelectorAll(".contract")].filter(each => !each.hidden).map(each => each.id);
        """,
    )

    def contracts(wanted: Any) -> list[str]:
        return [name for name in contract_names(MANY) if any(each.contract == name and wanted(each) for each in many)]

    def worst_is_fail(name: str, devices: tuple[str, ...]) -> bool:
        tiles = {(each.implementation, each.device): [] for each in many if each.contract == name and each.device in devices}
        for each in many:
            if each.contract == name and each.device in devices:
                tiles[each.implementation, each.device].append(each.status)
        return any("fail" in found and "crash" not in found for found in tiles.values())

    assert answer["all"] == answer["cuda"] == contract_names(MANY) and answer["none"] == []
    assert answer["failing"] == [name for name in contract_names(MANY) if worst_is_fail(name, DEVICES)] != answer["all"]
    assert answer["failing_cuda"] == [name for name in contract_names(MANY) if worst_is_fail(name, ("cuda",))]
    assert answer["family"] == contracts(lambda each: each.contract.startswith("routers."))
    assert answer["both"] == [name for name in answer["family"] if "softmax" in name] != answer["family"]
    assert answer["property"] == contracts(lambda each: each.property == "hidden_state" and each.status in FAILED) != []
    assert answer["columns"] == ["cuda"] and answer["spans"] == 8
    assert answer["sections"] == [name for name in contract_names(MANY) if "softmax" in name]


def test_a_link_opens_the_contract_and_every_anchor_is_found(tmp_path, text):
    answer = ask(
        tmp_path,
        text,
        """
        const tile = document.querySelector(".overview td.fail a");
        reveal(tile.hash.slice(1));
        answer.open = [...document.querySelectorAll(".contract[open]")].length;
        const inside = [...document.querySelectorAll(".contract[open] .grid a")];
        answer.missing = inside.filter(each => !find(each.hash.slice(1))).length;
        const cell = inside.find(each => each.hash.startsWith("#e"));
        cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
        answer.title = cell.title;
        reveal(cell.hash.slice(1));
        answer.found = document.querySelector(".found").id === cell.hash.slice(1);
        """,
    )
    assert answer["open"] == 1 and answer["missing"] == 0 and answer["found"]
    assert re.match(r"[✓!] · parity · reference · float32 · cpu · 0\.\d+ · \d+ · \d+ of 149 pairs\* · ", answer["title"])


def test_nothing_sticks_out_of_a_telephone(tmp_path):
    program = """
    answer.width = innerWidth; answer.wide = document.documentElement.scrollWidth;
    document.querySelectorAll(".contract").forEach(each => { each.open = true; fill(each); });
    document.querySelectorAll("details").forEach(each => { each.open = true; });
    answer.all = document.documentElement.scrollWidth;
    """
    answer = ask(tmp_path, page.render(verdicts(5, broken=0.2), ENVIRONMENT, "quick"), program, narrow=True)
    assert answer["width"] == 390 and answer["wide"] <= 390 and answer["all"] <= 390
