"""Every example runs, and what it claims of its results holds."""

from __future__ import annotations

import re
import runpy
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
    assert found["difference"] == 0.0
    assert found["distance"] < 0.45


def test_lora() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    found = run("lora")
    assert found["student"] < 0.8 * found["teacher"]
    assert found["share"] < 0.2


def test_own_conditions() -> None:
    found = run("own_conditions")
    one = {name.rpartition(" ")[0]: share for name, share in found.items() if name.endswith(" 1")}
    teacher, student = one.values()
    assert student > teacher + 0.2


def test_from_torchcfm() -> None:
    pytest.importorskip("torchcfm")
    assert run("from_torchcfm") is not False


@pytest.mark.slow
def test_from_diffusers() -> None:
    pytest.importorskip("diffusers")
    assert run("from_diffusers") is not False
