"""Every example runs, and what it claims of its results holds."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, argument: Any = True) -> Any:
    """Call the example's ``main``; by default its quick form."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](argument)


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text("utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'run("{path.stem}"' not in source] == []


def test_own_network(capsys: pytest.CaptureFixture[str]) -> None:
    run("own_network", 300)
    errors = [float(number) for number in re.findall(r"steps: ([\d.]+) from", capsys.readouterr().out)]
    # even a short training beats standing still: the data lie about two units from the noise
    assert len(errors) == 4
    assert min(errors) < 1.0


def test_stream() -> None:
    found = run("stream")
    assert found["checkpoints"] > 0  # without one the second training would start again
    assert found["difference"] == 0.0
    assert found["distance"] < 0.45


def test_lora() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    found = run("lora")
    assert found["student"] < 0.8 * found["teacher"]
    assert found["share"] < 0.2
    assert found["difference"] < 1e-4  # of the merged network


def test_own_conditions() -> None:
    found = run("own_conditions")
    one = {name.rpartition(" ")[0]: share for name, share in found.items() if name.endswith(" 1")}
    teacher, student = one.values()
    assert student > teacher + 0.2


def test_from_torchcfm() -> None:
    pytest.importorskip("torchcfm", exc_type=ImportError)
    found = run("from_torchcfm")
    models = {name.rpartition(" ")[0] for name in found if name.endswith(" 1")}
    (teacher,) = models - {"onecall"}
    assert found["onecall 1"] < 0.5 * found[f"{teacher} 1"]
    assert found["onecall 1"] < 1.3 * found[f"{teacher} 16"]
    assert found["difference"] < 1e-5


@pytest.mark.slow
def test_from_diffusers() -> None:
    pytest.importorskip("diffusers")
    found = run("from_diffusers")
    assert found["student"] < 0.5 * found["teacher"]
    assert found["difference"] < 1e-5


@pytest.mark.parametrize("name", ["own_conditions", "stream", "lora", "from_torchcfm", "from_diffusers"])
def test_an_example_says_how_it_is_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.startswith("from_"):
        pytest.importorskip(name.removeprefix("from_"), exc_type=ImportError)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert f"Run: python examples/{name}.py [--quick]" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["torchcfm", "diffusers"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"needs {package}: pip install"):
        run(f"from_{package}")
