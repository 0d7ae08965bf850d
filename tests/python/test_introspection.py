"""plan(), candidates(), tile_table(), build_info(): readable, consistent, refusing nonsense with a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import marlin_qqq
from marlin_qqq import introspection

pytest.importorskip("marlin_qqq._introspection", reason="built without Python.h")

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"]
SHAPES = [(64, 128), (4096, 4096), (8192, 21760), (28672, 4096)]


@pytest.mark.parametrize("device", ARCHITECTURES)
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("out_features, in_features", SHAPES)
def test_plan_is_the_best_candidate_and_a_tile_of_the_table(device, group_size, out_features, in_features):
    rows = {(tile.family, tile.name): tile for tile in marlin_qqq.tile_table()}
    for num_tokens in (1, 16, 100, 1024, 5000):
        plan = marlin_qqq.plan(num_tokens, out_features, in_features, group_size, device=device)
        row = rows[plan.family, plan.tile_name]
        assert (plan.tile_tokens, plan.tile_features) == (row.tile_tokens, row.tile_features)
        assert plan.grid > 0 and plan.split > 0 and plan.scratch_bytes >= 0
        best, *others = marlin_qqq.candidates(num_tokens, out_features, in_features, group_size, device=device)
        assert str(best) == str(plan)
        assert all(best.estimated_us <= other.estimated_us for other in others)


def test_plan_prints_its_fields():
    plan = marlin_qqq.plan(16, 4096, 4096, 128, device="sm_90")
    assert isinstance(plan, marlin_qqq.Plan)
    assert plan.tile_name in str(plan) and plan.family in str(plan)


def test_nothing_to_launch():
    assert marlin_qqq.plan(0, 4096, 4096).family == "none"


def test_hopper_kernels_are_hoppers_only():
    for device in ARCHITECTURES:
        families = {plan.family for plan in marlin_qqq.candidates(256, 4096, 4096, device=device)}
        assert ("sm90" in families) == (device == "sm_90")


def test_overrides():
    for candidate in marlin_qqq.candidates(64, 1024, 2048, -1, device="sm_90"):
        split = candidate.split * candidate.scratch_split  # blocks that share an output tile, in all
        plan = marlin_qqq.plan(64, 1024, 2048, -1, tile=candidate.tile_name, split=split, family=candidate.family)
        assert (plan.family, plan.tile_name) == (candidate.family, candidate.tile_name)
        assert plan.split * plan.scratch_split == split


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_tokens": -1}, "num_tokens must be 0 or more, got -1"),
        ({"out_features": 100}, "out_features must be a positive multiple of 64, got 100"),
        ({"in_features": 192}, "in_features must be a positive multiple of 128 below 132104, got 192"),
        ({"in_features": 132224}, "below 132104, got 132224"),
        ({"group_size": 64}, "group_size must be 128 or -1 (per-channel), got 64"),
        ({"device": "sm_42"}, "sm_42"),
        (
            {"tile": "no_such_tile"},
            "tile is 'no_such_tile'; allowed for num_tokens 16, out_features 128, in_features 256 on compute "
            "capability 9.0: ",
        ),
        ({"tile": "no_such_tile", "split": 2}, "tile is 'no_such_tile'; allowed for"),
        ({"split": 7777}, "split is 7777; allowed for num_tokens 16"),
        ({"tile": "warp16", "split": 7777}, "split is 7777 with tile 'warp16'; allowed for"),
        ({"family": "sm42"}, 'family must be "sm80" or "sm90", got "sm42"'),
    ],
)
def test_nonsense_is_refused(arguments, message):
    good = {"num_tokens": 16, "out_features": 128, "in_features": 256, "group_size": 128}
    with pytest.raises(ValueError) as caught:
        marlin_qqq.plan(**{**good, **arguments})
    assert message in str(caught.value)


def test_what_a_refusal_allows_is_taken():
    problem = (64, 1024, 2048)

    def allowed(**overrides) -> list[str]:
        with pytest.raises(ValueError) as caught:
            marlin_qqq.plan(*problem, **overrides)
        *names, last = str(caught.value).rpartition(": ")[2].split(", ")
        return names if last.startswith("or ") else [*names, last]

    tiles = allowed(tile="no_such_tile")
    assert set(tiles) == {plan.tile_name for plan in marlin_qqq.candidates(*problem)}
    for tile in tiles:
        assert marlin_qqq.plan(*problem, tile=tile).tile_name == tile
        for split in allowed(tile=tile, split=7777):
            plan = marlin_qqq.plan(*problem, tile=tile, split=int(split))
            assert plan.tile_name == tile and plan.split * plan.scratch_split == int(split)
    for split in allowed(split=7777):
        marlin_qqq.plan(*problem, split=int(split))


def test_build_info():
    info = marlin_qqq.build_info()
    assert info.version == (ROOT / "VERSION").read_text().strip()
    assert info.cpu_instruction_set in {"generic", "avx2", "avx_vnni", "avx512_vnni"}
    assert info.version in str(info) and info.cpu_instruction_set in str(info)


def test_without_the_module_only_its_functions_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "marlin_qqq._introspection", None)
    monkeypatch.delattr(marlin_qqq, "_introspection", raising=False)
    for call in (introspection.build_info, introspection.tile_table, lambda: introspection.plan(1, 64, 128)):
        with pytest.raises(ImportError, match="not built for this Python"):
            call()


def test_without_the_module_the_package_can_be_looked_at():
    code = """if True:
        import sys
        sys.modules["marlin_qqq._introspection"] = None
        names = {}
        exec("from marlin_qqq import *", names)
        assert "plan" in names and "Plan" not in names
        import inspect, pydoc
        import marlin_qqq
        from marlin_qqq import introspection
        assert "Plan" not in dir(marlin_qqq)
        for module in (marlin_qqq, introspection):
            assert not hasattr(module, "Plan")
            assert "plan" in dict(inspect.getmembers(module))
            assert "tile_table" in pydoc.render_doc(module)
        try:
            marlin_qqq.Plan
        except AttributeError as error:
            assert "not built for this Python" in str(error)
    """
    package = str(Path(marlin_qqq.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": package})


def test_needs_no_torch():
    code = "import marlin_qqq, sys; marlin_qqq.plan(1, 64, 128); assert 'torch' not in sys.modules"
    package = str(Path(marlin_qqq.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": package})
