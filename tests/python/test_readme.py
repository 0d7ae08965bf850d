"""The README's Python does what it says, with smaller sizes."""

from __future__ import annotations

import re

import pytest
import torch
from repository import ROOT

import marlin_qqq

README = (ROOT / "README.md").read_text()


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_snippets_run_one_after_the_other():
    first, second, third = (code.replace("11008", "192").replace("4096", "256") for code in snippets())
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(256, 128), "lm_head": torch.nn.Linear(256, 64)})
    names: dict = {"model": model}
    exec(first, names)
    assert names["y"].shape == (2, 5, 192)
    assert isinstance(model["proj"], marlin_qqq.QQQLinear)
    assert isinstance(model["lm_head"], torch.nn.Linear)
    exec(second, names)
    assert (names["y"].shape, names["y"].dtype) == ((5, 192), torch.bfloat16)
    pytest.importorskip("marlin_qqq._introspection")
    exec(third, names)


def test_files_that_it_links_to_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
