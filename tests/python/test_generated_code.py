"""What is generated and committed is what the generator writes."""

from __future__ import annotations

from repository import load_script


def test_wgmma_wrappers() -> None:
    generate_wgmma = load_script("scripts/generate_wgmma.py")
    assert generate_wgmma.TARGET.read_text() == generate_wgmma.generated()
