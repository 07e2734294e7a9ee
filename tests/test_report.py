from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.citations import CITATIONS, bibtex, short_reference
from fewstep.data import from_array, load_data
from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.generator import Config, Generator
from fewstep.methods.registry import METHODS
from fewstep.networks import build, resolve
from fewstep.pipeline.compare import compare
from fewstep.report import scatter_sheet, sheet, write_report, write_sheet
from fewstep.report.curves import error_curves, read_statistics, smoothed
from fewstep.report.drawing import spread
from fewstep.report.html_tables import comparison
from fewstep.report.page import METRIC_CITATIONS
from fewstep.report.samples import COLUMNS, Plane, frame, label_argument, real_columns, reference_units
from fewstep.report.sheets import principal_directions
from fewstep.report.trajectories import LINES, follow
from fewstep.report.words import headline, number, warnings
from fewstep.solvers.maps import SampleRule
from fewstep.store.files import read_json, write_json
from fewstep.store.pairs import PairStore

RECIPE = "data: digits  # <script>alert('&')</script>\nstages: {teacher: {method: flow_matching}}\n"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(data: DataSet, name: str, seed: int, *, classes: int = 0, **config: Any) -> Generator:
    """An untrained network with a velocity that is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = resolve({"name": "mlp", "width": 32, "blocks": 1}, data.shape, classes=classes)
        net = build(network)
        for weights in net.parameters():
            nn.init.normal_(weights, std=0.15)
    weights = tuple([1 / classes] * classes) if classes else ()
    about = Config(
        shape=data.shape,
        network=network,
        stage=name,
        scaling=data.scaling.as_dict(),
        class_weights=weights,
        **config,
    )
    return Generator(net.requires_grad_(False), config=about)


def result_of(models: list[Generator], data: DataSet, steps: tuple[int, ...] = (1, 3)) -> dict[str, Any]:
    return compare(models, data, steps=steps, samples=150, say=None).result


class Page(HTMLParser):
    """Tags, images and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.preformatted: list[str] = []
        self._pre = False
        self._skip = False
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag == "style"
        if tag == "pre":
            self._pre = True
            self.preformatted.append("")

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        self._pre = self._pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._pre:
            self.preformatted[-1] += data
        if not self._skip:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def images(self) -> list[tuple[str, Image.Image, int]]:
        """Alternative text, decoded image and shown width of every picture."""
        found = []
        for tag, attrs in self.tags:
            if tag == "img":
                prefix, _, data = str(attrs["src"]).partition(",")
                assert prefix == "data:image/png;base64"
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                found.append((str(attrs["alt"]), image, int(str(attrs["width"]))))
        return found

    def rows(self, kind: str) -> list[str]:
        return [
            " ".join(re.sub("<[^>]+>", " ", row).split())
            for row in re.findall(rf'<tr class="{kind}[^"]*">(.*?)</tr>', self.html, re.DOTALL)
        ]


@pytest.fixture(scope="module")
def digits() -> DataSet:
    whole = load_data("digits")
    assert whole.labels is not None
    return dataclasses.replace(whole, rows=whole.rows[:400], labels=whole.labels[:400])


@pytest.fixture(scope="module")
def trio(digits: DataSet) -> list[Generator]:
    return [
        model(digits, "teacher", 1, classes=10, method="flow_matching"),
        model(digits, "straight", 2, classes=10, method="reflow", guidance=2.0),
        model(digits, "onestep", 3, classes=10, method="distill", rule=SampleRule("map", (1,), 1)),
    ]


@pytest.fixture(scope="module")
def digits_result(trio: list[Generator], digits: DataSet) -> dict[str, Any]:
    return result_of(trio, digits)


@pytest.fixture(scope="module")
def digits_page(
    trio: list[Generator],
    digits: DataSet,
    digits_result: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Page:
    folder = tmp_path_factory.mktemp("report")
    stats = folder / "stats.jsonl"
    lines = [
        {"stage": name, "phase": k // 5, "samples": 256 * k, "step": k, "terms": {"loss": 1.0 / k}}
        for name in ("teacher", "straight", "onestep")
        for k in range(1, 11)
    ]
    stats.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "onest')
    path = write_report(
        folder / "report.html",
        result=digits_result,
        models=trio,
        data=digits,
        title="digits <&> friends",
        recipe_text=RECIPE,
        environment={"seed": 7, "versions": {"torch": "2.x"}},
        command="fewstep run 'a<b>.yaml'",
        stats=stats,
    )
    return Page(path)


def test_the_page_loads_nothing_and_is_small(digits_page: Page) -> None:
    for tag, attrs in digits_page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href", "srcset", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#"))
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", digits_page.html)
    assert "url(" not in digits_page.html
    assert len(digits_page.html) < 3_000_000


def test_links_within_the_page_have_a_target(digits_page: Page) -> None:
    targets = {attrs["id"] for _, attrs in digits_page.tags if "id" in attrs}
    links = {str(attrs["href"])[1:] for tag, attrs in digits_page.tags if tag == "a"}
    assert links
    assert links <= targets


def test_every_row_of_the_comparison_is_in_the_table(digits_page: Page, digits_result: dict[str, Any]) -> None:
    shown = digits_page.rows("model")
    for row in digits_result["rows"]:
        scores = row["scores"]
        numbers = [number(scores[key]) for key in ("energy", "energy_held_out", "precision", "recall")]
        if row.get("control"):
            assert any(r.startswith(row["model"]) and numbers[0] in r for r in digits_page.rows("control"))
        else:
            start = f"{row['model']} {row['steps']} {row['nfe']} "
            assert any(r.startswith(start) and all(n in r.split() for n in numbers) for r in shown), row
    assert number(digits_result["rows"][0]["scores"]["energy_floor"]) in digits_page.rows("floor")[0]


def test_texts_are_escaped(digits_page: Page) -> None:
    assert RECIPE.strip() in [text.strip() for text in digits_page.preformatted]
    assert "fewstep run 'a<b>.yaml'" in digits_page.preformatted
    assert "<script>" not in digits_page.html
    assert "digits <&> friends" in digits_page.text
    assert "<td>versions.torch</td><td>2.x</td>" in digits_page.html


def test_pictures_decode_to_their_sizes(digits_page: Page) -> None:
    strips = [image for alt, image, _ in digits_page.images() if alt.startswith(("samples of", "images of"))]
    assert len(strips) == 1 + 5  # real data; two flows at two step counts, one map
    assert {image.size for image in strips} == {(16 * 48 + 15 * 2, 48)}
    figures = [(image, width) for alt, image, width in digits_page.images() if "against" in alt or "loss" in alt]
    assert len(figures) == 3
    for image, width in figures:
        assert abs(image.width - 2 * width) <= 1
        assert 400 < width <= 1100
        assert len(image.convert("L").getcolors()) > 20  # something is drawn on it


def test_the_diagnosis_is_drawn_and_tabled(digits_page: Page, digits_result: dict[str, Any]) -> None:
    drawn = {alt: image for alt, image, _ in digits_page.images() if "along time" in alt}
    assert set(drawn) == {
        "deviation, acceleration and normal acceleration along time",
        "local error and stiffness along time",
    }
    assert all(len(image.convert("L").getcolors()) > 20 for image in drawn.values())
    for name, d in digits_result["diagnosis"].items():
        errors = dict(zip(d["euler_steps"], d["euler_error_trimmed"], strict=True))
        shares = [f"{100 * errors[steps] / d['displacement'] ** 0.5:.3g} %" for steps in (8, 16)]
        end = f"{d['path_length_ratio']:.3f} {shares[0]} {shares[1]} {number(max(d['stiffness']))}"
        assert any(row.startswith(f"{name} ") and row.endswith(end) for row in digits_page.rows("model")), end


def test_every_profile_of_the_errors_is_drawn(digits_result: dict[str, Any]) -> None:
    """The picture of equal numbers is the same; with one profile doubled it is another."""
    colours = {"teacher": "#2b6cb0", "straight": "#d2602a"}
    picture = error_curves(digits_result, colours)
    assert picture is not None
    assert picture.png == error_curves(digits_result, colours).png  # type: ignore[union-attr]
    found = digits_result["diagnosis"]
    d = found["teacher"]
    for key in ("stiffness", "weighted_error", "local_error"):
        other = {**d, key: [2 * value for value in d[key]]}
        changed = error_curves(
            {**digits_result, "diagnosis": {**digits_result["diagnosis"], "teacher": other}}, colours
        )
        assert changed is not None
        assert changed.png != picture.png, key


def test_a_diagnosis_of_an_older_run_lacks_errors_and_stiffness(
    trio: list[Generator], digits: DataSet, digits_result: dict[str, Any], tmp_path: Path
) -> None:
    new = ("_error", "stiffness", "euler", "unit")
    old = {
        name: {key: value for key, value in d.items() if not any(word in key for word in new) or key == "local_error"}
        for name, d in digits_result["diagnosis"].items()
    }
    for d, whole in zip(old.values(), digits_result["diagnosis"].values(), strict=True):
        d["straightness_error"] = whole["straightness_error"]
    result = {**digits_result, "diagnosis": old}
    page = Page(write_report(tmp_path / "r.html", result=result, models=trio, data=digits, title="old"))
    assert [alt for alt, _, _ in page.images() if "along time" in alt] == [
        "deviation, acceleration and normal acceleration along time"
    ]
    assert any(row.startswith("straight ") and row.endswith("– – –") for row in page.rows("model"))


def test_a_strip_shows_the_samples_that_generator_sample_gives(digits_page: Page, trio: list[Generator]) -> None:
    samples = trio[2].sample(COLUMNS, label=[k % 10 for k in range(COLUMNS)], seed=0).numpy()  # data units 0 … 16
    alt, image, _ = next(found for found in digits_page.images() if found[0].startswith("samples of onestep"))
    assert alt == "samples of onestep with 1 call"
    page = np.asarray(image)
    for k, expected in enumerate(samples):
        cell = page[:, 50 * k : 50 * k + 48]
        assert np.array_equal(cell[3::6, 3::6], np.rint(255 * expected / 16).astype(np.uint8))
        assert np.array_equal(cell, cell[3::6, 3::6].repeat(6, 0).repeat(6, 1))  # nearest neighbour


def test_real_images_have_the_class_of_their_column(digits: DataSet) -> None:
    assert digits.labels is not None
    rows = real_columns(digits, torch.arange(COLUMNS) % 10, seed=3)
    assert digits.labels[rows].tolist() == [k % 10 for k in range(COLUMNS)]
    assert len(set(rows.tolist())) == COLUMNS
    assert np.isin(rows, digits.train).all()


def test_the_papers_of_what_was_used_are_cited(digits_page: Page) -> None:
    entries = digits_page.preformatted[-1]
    for key in ("liu2023flow", "lipman2023flow", "ho2022classifier", "szekely2013energy"):
        assert f"{{{key}," in entries
    assert "song2021denoising" not in entries


def test_the_report_is_a_function_of_its_arguments_and_leaves_the_global_state_alone(
    trio: list[Generator], digits: DataSet, digits_result: dict[str, Any], tmp_path: Path
) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    pages = []
    for name in ("a.html", "b.html"):
        write_json(tmp_path / "compare.json", digits_result)
        result = digits_result if name == "a.html" else read_json(tmp_path / "compare.json")
        path = write_report(tmp_path / name, result=result, models=trio[::-1], data=digits, title="t")
        pages.append(path.read_bytes())
    assert pages[0] == pages[1]  # compare.json, with its sorted keys, gives the same page
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def rgb_data() -> DataSet:
    rows = np.random.default_rng(0).integers(0, 256, (60, 3, 12, 12)).astype(np.uint8)
    data = from_array(rows, name="colour")  # as from a folder of images, whose files are (H, W, C)
    return dataclasses.replace(data, scaling=dataclasses.replace(data.scaling, layout="HWC"))


def vectors(size: int) -> DataSet:
    return from_array(np.random.default_rng(1).normal(size=(300, size)) * 3 + 1, name=f"vectors-{size}")


@pytest.mark.parametrize(("kind", "pictures"), [("rgb", 4 + 3), ("one", 1 + 3), ("two", 1 + 3), ("five", 1 + 3)])
def test_a_single_model_without_diagnosis_is_reported_on_any_kind_of_data(
    kind: str, pictures: int, tmp_path: Path
) -> None:
    data = rgb_data() if kind == "rgb" else vectors({"one": 1, "two": 2, "five": 5}[kind])
    only = model(data, "only$model^", 5)
    result = result_of([only], data, steps=(1, 2, 4))
    result["diagnosis"] = {}
    page = Page(write_report(tmp_path / "r.html", result=result, models=[only], data=data, title="one"))
    assert len(page.images()) == pictures
    assert "Straightness" not in page.text
    assert "Trajectories" in page.text
    assert [row.split()[0] for row in page.rows("model")].count("only$model^") == 3 + 3 + 1


def test_colour_images_keep_their_colours(tmp_path: Path) -> None:
    data = rgb_data()
    only = model(data, "m", 5)
    result = result_of([only], data, steps=(1,))
    page = Page(write_report(tmp_path / "r.html", result=result, models=[only], data=data, title="one"))
    image = next(image for alt, image, _ in page.images() if alt.startswith("images of"))
    assert image.mode == "RGB"
    expected = data.rows[real_columns(data, None, 0)[0]]  # (3, 12, 12)
    assert np.array_equal(np.asarray(image)[2:48:4, 2:48:4], np.moveaxis(expected, 0, -1))


def test_maps_alone_have_neither_trajectories_nor_straightness(tmp_path: Path) -> None:
    data = vectors(2)
    only = model(data, "m", 5, rule=SampleRule("map", (1,), 1))
    path = write_report(tmp_path / "r.html", result=result_of([only], data), models=[only], data=data, title="one")
    page = Page(path)
    assert "Trajectories" not in page.text
    assert "Straightness" not in page.text


def test_models_that_do_not_fit_the_result_are_refused(
    trio: list[Generator], digits: DataSet, digits_result: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="rows of 'onestep', and that model was not given"):
        write_report(tmp_path / "r.html", result=digits_result, models=trio[:2], data=digits, title="t")
    with pytest.raises(UserError, match="no row of a model"):
        write_report(tmp_path / "r.html", result={"rows": []}, models=trio, data=digits, title="t")


def row(name: str, nfe: int, energy: float, *, se: float = 0.001, method: str = "", **scores: Any) -> dict[str, Any]:
    fields = {
        "energy": energy, "energy_se": se, "energy_floor": 0.0075, "energy_floor_sd": 0.0005,
        "precision": 0.9, "recall": 0.9, "memorised": 0.05, "memorised_flag": False,
        "replicas": 0.0, "replicas_base": 0.0,
    }  # fmt: skip
    return {"model": name, "method": method, "steps": nfe, "nfe": nfe, "scores": fields | scores}


TEACHER = [row("teacher", 1, 1.55), row("teacher", 8, 0.05), row("teacher", 50, 0.016, precision=0.92)]
GAUSSIAN = {**row("moment-matched Gaussian", 0, 0.016, precision=0.09), "control": True}


def said(rows: list[dict[str, Any]], **more: Any) -> str:
    words = " ".join(map(str, headline({"rows": rows, **more})))
    return re.sub("<[^>]+>", "", words)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [*TEACHER, row("onestep", 1, 0.019, precision=0.94)],
            "One call of onestep reaches energy 0.019; teacher needs 50 calls for 0.016 and scores 1.55 with "
            "one call. Precision is 0.940 against 0.920 there, recall 0.900 against 0.900.",
        ),
        (
            [*TEACHER, row("onestep", 1, 0.0486)],
            "One call of onestep reaches energy 0.049; teacher needs 8 calls for 0.050 and scores 1.55 with "
            "one call. Precision is 0.900 against 0.900 there, recall 0.900 against 0.900.",
        ),
        (
            [*TEACHER, row("onestep", 1, 0.008)],
            "One call of onestep reaches energy 0.0080; teacher reaches at best 0.016, with 50 calls, "
            "and scores 1.55 with one call. Precision is 0.900 against 0.920 there, recall 0.900 against "
            "0.900.",
        ),
        (
            [row("teacher", 1, 0.02), row("onestep", 1, 0.019)],
            "One call of onestep reaches energy 0.019; teacher is as good with as many calls (0.020). "
            "Precision is 0.900 against 0.900 there, recall 0.900 against 0.900.",
        ),
        (
            TEACHER,
            "One call of teacher reaches energy 1.55; 50 calls reach 0.016. There, precision is 0.920 and "
            "recall 0.900.",
        ),
        (
            [row("slow", 2, 0.3)],
            "2 calls of slow reach energy 0.300. There, precision is 0.900 and recall 0.900.",
        ),
    ],
)  # fmt: skip
def test_the_headline_of_given_rows(rows: list[dict[str, Any]], expected: str) -> None:
    assert said([*rows, GAUSSIAN]) == expected


def test_the_headlines_numbers_are_those_of_the_result(digits_page: Page, digits_result: dict[str, Any]) -> None:
    rows = [r for r in digits_result["rows"] if not r.get("control")]
    one_call = min((r for r in rows if r["nfe"] == 1), key=lambda r: r["scores"]["energy"])
    start = f"One call of {one_call['model']} reaches energy {number(one_call['scores']['energy'])}"
    assert start in digits_page.text


def warned(rows: list[dict[str, Any]], **more: Any) -> list[str]:
    return [re.sub("<[^>]+>", "", str(w)) for w in warnings({"rows": rows, **more})]


def test_warnings_that_do_not_apply_are_left_out() -> None:
    good = [*TEACHER, row("onestep", 1, 0.019, precision=0.94)]
    assert warned(good) == []
    assert warned([*good, {**GAUSSIAN, "scores": GAUSSIAN["scores"] | {"energy": 0.8}}]) == []
    (found,) = warned([*good, GAUSSIAN])
    assert "moment-matched Gaussian, which uses no model, has energy 0.016 but precision 0.090" in found


def test_a_lower_recall_at_equal_energy_is_warned_of() -> None:
    (found,) = warned([*TEACHER, row("onestep", 1, 0.016, recall=0.6)])
    assert found.startswith("onestep with 1 call has recall 0.600, teacher with 50 calls has 0.900")


def test_memorisation_and_energy_below_the_floor_are_warned_of() -> None:
    copies = row("onestep", 1, 0.004, memorised_flag=True, replicas=0.25, replicas_base=0.01)
    flagged, below = warned([*TEACHER, copies])
    assert "1 of 4 rows are flagged" in flagged
    assert "25.0% of its samples" in flagged
    assert "onestep with 1 call has energy 0.0040, below the 0.0075 of new data" in below


def test_reflow_without_effect_is_warned_of_in_any_order_of_keys() -> None:
    rows = [*TEACHER, row("straight", 1, 0.1, method="reflow")]
    no_effect = {"straight": {"straightness": 9.0}, "teacher": {"straightness": 8.9}}
    assert warned(rows, diagnosis=no_effect) == [
        "straight is not straighter than teacher (S 9.00 against 8.90): ReFlow had no effect."
    ]
    assert warned(rows, diagnosis={"straight": {"straightness": 0.4}, "teacher": {"straightness": 8.9}}) == []


def test_the_best_of_a_column_is_marked_and_controls_are_not() -> None:
    heads, lines = comparison({"rows": [*TEACHER, row("onestep", 1, 0.0161), GAUSSIAN]})
    column = [title for title, _ in heads].index("energy")
    marked = [line.name for line in lines if line.cells[column].best]
    assert marked == ["teacher", "onestep"]  # .0160 and .0161 are printed alike
    assert lines[-1].kind == "floor"
    assert lines[-1].cells[column].text == "0.0075"
    assert not any(cell.best for line in lines if line.kind != "model" for cell in line.cells)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [([0.1, 0.5], [0.1, 0.5]), ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]), ([0.0, 0.02, 0.9], [-0.04, 0.06, 0.9])],
)
def test_labels_move_apart_about_their_middle_and_no_further(heights: list[float], expected: list[float]) -> None:
    assert spread(heights, 0.1) == pytest.approx(expected)


def test_many_labels_keep_their_order_and_distance() -> None:
    heights = sorted(np.random.default_rng(0).random(9).tolist())
    moved = spread(heights, 0.08)
    assert (np.diff(moved) >= 0.08 - 1e-12).all()
    assert np.mean(moved) == pytest.approx(np.mean(heights), abs=0.03)


def test_principal_directions_are_those_of_a_known_covariance() -> None:
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    points = rng.normal(size=(4000, 5)) * [9.0, 4.0, 1.0, 0.5, 0.1] @ turn.T + 3
    cosines = np.abs(np.diag(principal_directions(points).T @ turn[:, :2]))
    assert cosines == pytest.approx([1, 1], abs=2e-3)


def test_points_of_the_plane_are_shown_in_data_units() -> None:
    data = vectors(2)
    assert np.allclose(Plane(data)(data.network_rows([0, 5])), data.rows[[0, 5]], atol=1e-5)
    (left, right), (bottom, top) = frame(data.rows, share=1.0)
    assert left < data.rows[:, 0].min() < data.rows[:, 0].max() < right
    assert right - left == pytest.approx(top - bottom)


def test_models_of_another_scaling_are_shown_where_their_samples_lie() -> None:
    data, other = vectors(2), from_array(np.random.default_rng(2).normal(size=(50, 2)) * 9 - 4)
    for trained_on in (data, other):
        found = model(data, "m", 3)
        found.config = dataclasses.replace(found.config, scaling=trained_on.scaling.as_dict())
        shown = Plane(data)(reference_units(found.draw(20, steps=2).x, found, data))
        assert np.allclose(shown, found.sample(20, steps=2), atol=1e-4)
    plain = Generator(Turning(), shape=(2,))  # no scaling: it works in the data's own units
    assert np.allclose(Plane(data)(reference_units(plain.draw(20).x, plain, data)), plain.sample(20), atol=1e-4)


class Turning(nn.Module):
    """``v = pi/2 J x``: every trajectory is a quarter of a circle."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.pi / 2 * torch.stack([-x[:, 1], x[:, 0]], 1)


def test_trajectories_follow_the_field_and_chords_join_their_ends() -> None:
    states, chord = follow(Generator(Turning(), shape=(2,)), seed=4, pairs=None)
    radius = states.norm(dim=-1)
    assert states.shape == (49, LINES, 2)
    assert torch.allclose(radius, radius[:1].expand_as(radius), atol=1e-5)
    assert torch.allclose(states[-1, :, 0], -states[0, :, 1], atol=1e-5)  # turned by 90 degrees
    assert torch.equal(chord, states[[0, -1]])


def test_with_pairs_trajectories_start_at_their_noise_and_chords_are_the_pairs(tmp_path: Path) -> None:
    x0 = torch.randn(LINES + 20, 2, generator=torch.Generator().manual_seed(0))
    store = PairStore(tmp_path / "generated", {"teacher": "t"}, len(x0))
    store.open()
    store.write_shard(0, {"x0": x0, "x1": 3 * x0})
    store.finish({"relative_error": 0.01})
    states, chord = follow(Generator(Turning(), shape=(2,)), seed=4, pairs=tmp_path / "generated")
    used = store.training_rows().columns(torch.arange(LINES))["x0"]
    assert torch.equal(states[0], used)
    assert torch.equal(chord, torch.stack([used, 3 * used]))


def test_labels_are_given_in_the_datas_own_numbers(digits: DataSet) -> None:
    named = model(digits, "m", 0, classes=3, label_names=(4, 7, 9))
    assert label_argument(named, torch.tensor([0, 2, 1])) == [4, 9, 7]
    assert named.draw(3, label=label_argument(named, torch.tensor([0, 2, 1]))).label.tolist() == [0, 2, 1]
    assert label_argument(model(digits, "m", 0), torch.tensor([0])) is None


def test_cut_off_statistics_are_left_out_and_the_median_ignores_a_spike(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"stage": "a", "samples": 1, "terms": {"loss": 2.0}}\n{"stage": "a", "sam')
    assert [line["terms"]["loss"] for line in read_statistics(path)["a"]] == [2.0]
    spiked = np.ones(200)
    spiked[100] = 50.0
    assert (smoothed(spiked) == 1.0).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0163, "0.016"), (0.9998, "1.000"), (1.0, "1.000"), (1.554, "1.55"), (86.53, "86.5"),
        (1234.5, "1,234"), (0.0075, "0.0075"), (3.9e-4, "0.00039"), (-3e-17, "0.000"), (50, "50"),
        (None, "–"), (float("nan"), "–"), (-0.25, "-0.250"),
    ],
)  # fmt: skip
def test_numbers_are_printed_with_the_places_they_need(value: float | None, text: str) -> None:
    assert number(value) == text


# sheets


@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC"])
def test_a_sheet_holds_every_image_in_order(layout: str, tmp_path: Path) -> None:
    images = torch.arange(6 * 16).reshape(6, 4, 4).float()
    given = {"NHW": images, "NCHW": images[:, None], "NHWC": images[..., None]}[layout]
    page = np.asarray(Image.open(write_sheet(given, tmp_path / "s.png", limits=(0, 95), columns=4)))
    assert page.shape == (2 * 48 + 2, 4 * 48 + 6)
    for k in range(6):
        cell = page[50 * (k // 4) :, 50 * (k % 4) :][:48, :48][6::12, 6::12]
        assert np.array_equal(cell, np.rint(255 * images[k].numpy() / 95).astype(np.uint8))


def test_large_images_are_reduced_and_limits_clip(tmp_path: Path) -> None:
    images = torch.full((2, 3, 320, 640), 5.0)
    page = np.asarray(Image.open(sheet(images, tmp_path / "s.png", limits=(0, 1), columns=1)))
    assert page.shape == (2 * 80 + 2, 160, 3)
    assert page[:80].min() == 255


@pytest.mark.parametrize("size", [1, 2, 7])
def test_vectors_are_drawn_as_points(size: int, tmp_path: Path) -> None:
    x = torch.randn(500, size, generator=torch.Generator().manual_seed(0))
    with Image.open(write_sheet(x, tmp_path / "s.png")) as image:
        assert image.size == (960, 960 if size > 1 else 614)
        dots = np.asarray(image.convert("RGB")).astype(int)
    blue = (dots[..., 2] - dots[..., 0]) > 60
    assert 0.005 < blue.mean() < 0.6


@pytest.mark.parametrize(
    ("x", "name", "options", "match"),
    [
        (torch.zeros(4, 2, 8, 8), "s.png", {}, r"\(4, 2, 8, 8\) are not grey or colour images"),
        (torch.zeros(4), "s.png", {}, r"shape \(4,\) cannot be drawn"),
        (torch.zeros(0, 8, 8), "s.png", {}, "cannot be drawn"),
        (torch.zeros(2, 1, 1, 8, 8), "s.png", {}, "cannot be drawn"),
        (torch.full((2, 8, 8), torch.nan), "s.png", {}, "NaN or infinite"),
        (torch.zeros(2, 8, 8), "s.jpg", {}, r"'.*s\.jpg' does not end in .png"),
        (torch.zeros(2, 8, 8), "s.png", {"columns": 0}, "columns must be at least 1, got 0"),
        (torch.zeros(2, 8, 8), "s.png", {"limits": (1, 0)}, r"limits must be \(lowest, highest\)"),
        (torch.zeros(9, 2), "s.png", {"columns": 3}, "limits and columns are for images"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_drawn_are_refused(
    x: Tensor, name: str, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        write_sheet(x, tmp_path / name, **options)
    assert not (tmp_path / name).exists()


def test_a_scatter_sheet_refuses_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs vectors"):
        scatter_sheet(torch.zeros(3, 8, 8), tmp_path / "s.png")


# citations


def test_every_method_and_score_has_its_paper() -> None:
    for spec in METHODS.values():
        assert spec.cite
        assert set(spec.cite) <= set(CITATIONS)
    assert set(METRIC_CITATIONS) <= set(CITATIONS)


@pytest.mark.parametrize("key", sorted(CITATIONS))
def test_entries_are_whole(key: str) -> None:
    entry = bibtex([key])
    depth = np.cumsum([(c == "{") - (c == "}") for c in entry])
    assert depth[-1] == 0
    assert (depth[:-1] > 0)[entry.index("{") :].all()
    citation = CITATIONS[key]
    authors, year, arxiv = (citation.fields.get(name) for name in ("author", "year", "eprint"))
    assert authors is not None
    assert year is not None
    assert key.startswith(re.sub(r"[^a-z]", "", short_reference(key).split()[0].lower().translate(PLAIN)))
    assert f"year = {{{year}}}" in entry
    assert year in key or citation.kind == "misc"
    assert all("," in author for author in authors.split(" and "))
    assert arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", arxiv)
    assert arxiv is None or 2000 + int(arxiv[:2]) <= int(year)  # a preprint is not younger than its paper
    assert not set("{}\\") & set(short_reference(key))


PLAIN = str.maketrans("äéü", "aeu")


def test_citations_come_once_in_the_order_asked_and_typos_are_helped() -> None:
    keys = re.findall(r"^@\w+\{(\w+),", bibtex(["liu2023flow", "ho2022classifier", "liu2023flow"]), re.MULTILINE)
    assert keys == ["liu2023flow", "ho2022classifier"]
    with pytest.raises(UserError, match="unknown citation 'liu2023flw': did you mean 'liu2023flow'"):
        bibtex(["liu2023flw"])
