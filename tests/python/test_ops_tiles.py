"""Every CUDA kernel variant gives the CPU op's bits: each candidate of the planner is forced in turn."""

from __future__ import annotations

import re

import pytest
import reference
import torch

from marlin_qqq import marlin_qqq_gemm, marlin_qqq_linear
from marlin_qqq.bench.tune import ask_candidates

pytestmark = pytest.mark.gpu


def count_candidates(monkeypatch: pytest.MonkeyPatch, problem: reference.Problem) -> int:
    """How many launches the planner knows for this problem on this GPU: the op says so when asked for one too many."""
    monkeypatch.setenv("MARLIN_QQQ_CANDIDATE", "1000000")
    with pytest.raises(RuntimeError) as caught:
        marlin_qqq_gemm(*problem.arguments)
    match = re.search(r"MARLIN_QQQ_CANDIDATE must be an integer from 0 to (\d+), got 1000000", str(caught.value))
    assert match
    return int(match[1]) + 1


@pytest.mark.parametrize("family", ["sm80", "sm90"])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 128, 257, 400])
@pytest.mark.parametrize("out_features, in_features", [(64, 128), (320, 384), (1024, 2048)])
def test_every_candidate(monkeypatch, family, group_size, out_dtype, num_tokens, out_features, in_features):
    if family == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90 kernels run on Hopper only")
    problem = reference.random_problem(num_tokens, out_features, in_features, group_size, seed=num_tokens)
    bias = torch.randn(out_features).to(out_dtype)
    expected = marlin_qqq_gemm(*problem.arguments, bias=bias, out_dtype=out_dtype).cuda()
    on_gpu, bias = problem.to("cuda"), bias.cuda()
    monkeypatch.setenv("MARLIN_QQQ_FAMILY", family)
    # Launches that stand alone (plan::Problem::standalone) differ for few tokens.
    for standalone, promises in (("0", (False, True)), ("1", (False, True) if num_tokens <= 33 else ())):
        monkeypatch.setenv("MARLIN_QQQ_STANDALONE", standalone)
        for candidate in range(count_candidates(monkeypatch, on_gpu)):
            monkeypatch.setenv("MARLIN_QQQ_CANDIDATE", str(candidate))
            for constant_weights in promises:  # another kernel, for some
                got = marlin_qqq_gemm(
                    *on_gpu.arguments, bias=bias, out_dtype=out_dtype, constant_weights=constant_weights
                )
                where = f"candidate {candidate}, standalone {standalone}, constant_weights={constant_weights}"
                assert reference.same_bits(got, expected), where


# Rings of the eight warps with one to seven stages each: a kernel that dequantises before its wait keeps two of them in
# registers and up to two in shared memory, if the ring (of three or four) holds all.
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 23, 32])
@pytest.mark.parametrize("in_features", [1024, 2176, 3072, 4096, 4224, 7168])
def test_stages_dequantised_before_the_wait(monkeypatch, group_size, num_tokens, in_features):
    problem = reference.random_problem(num_tokens, 320, in_features, group_size, seed=in_features)
    x = torch.randn(num_tokens, in_features, dtype=torch.float16)
    weights = (problem.b_q_weight, problem.s_ch, problem.s_group)
    expected = marlin_qqq_gemm(*problem.arguments).cuda()
    expected_linear = marlin_qqq_linear(x, *weights).cuda()
    on_gpu, x, weights = problem.to("cuda"), x.cuda(), [weight.cuda() for weight in weights]
    for tile in sorted({f"warp{-(-num_tokens // 8) * 8}", f"pair{-(-num_tokens // 8) * 8}", "warp32"}):
        for split in (1, 2):
            monkeypatch.setenv("MARLIN_QQQ_TILE", tile)
            monkeypatch.setenv("MARLIN_QQQ_SPLIT", str(split))
            for _ in range(3):
                got = marlin_qqq_gemm(*on_gpu.arguments, constant_weights=True)
                assert reference.same_bits(got, expected), (tile, split)
                got = marlin_qqq_linear(x, *weights, constant_weights=True)
                assert reference.same_bits(got, expected_linear), (tile, split, "linear")


# Without constant weights a launch uses a part of its rings' stages (plan::sm90_used_stages): each goes round several
# times here, over 64 stages of inputs, also where blocks walk over tiles. 5,120 features leave splits of shared rings
# among the candidates of up to 96 tokens.
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(
    "num_tokens, out_features",
    [(1, 320), (16, 320), (29, 320), (48, 320), (90, 320), (55, 5120), (90, 5120), (20, 12352)],
)
def test_rings_that_use_a_part_of_their_stages(monkeypatch, group_size, num_tokens, out_features):
    problem = reference.random_problem(num_tokens, out_features, 8192, group_size, seed=num_tokens)
    expected = marlin_qqq_gemm(*problem.arguments).cuda()
    on_gpu = problem.to("cuda")
    for candidate in range(count_candidates(monkeypatch, on_gpu)):
        monkeypatch.setenv("MARLIN_QQQ_CANDIDATE", str(candidate))
        assert reference.same_bits(marlin_qqq_gemm(*on_gpu.arguments), expected), f"candidate {candidate}"


# Token scales are the one argument that may start anywhere.
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 33, 64, 100, 300])
def test_token_scales_at_any_offset(monkeypatch, num_tokens):
    problem = reference.random_problem(num_tokens, 320, 1152, -1, seed=num_tokens)
    expected = marlin_qqq_gemm(*problem.arguments).cuda()
    on_gpu = problem.to("cuda")
    storage = torch.full((num_tokens + 4,), float("nan"), device="cuda")
    shifted = [storage.clone()[offset : offset + num_tokens].view(num_tokens, 1) for offset in range(4)]
    for view in shifted:
        view.copy_(on_gpu.s_tok)
    for candidate in range(count_candidates(monkeypatch, on_gpu)):
        monkeypatch.setenv("MARLIN_QQQ_CANDIDATE", str(candidate))
        for offset, view in enumerate(shifted):
            got = marlin_qqq_gemm(*on_gpu._replace(s_tok=view).arguments)
            assert reference.same_bits(got, expected), f"candidate {candidate}, offset {offset}"


# 33 tiles of 128 features: with up to 17 of tokens, blocks of every multiprocessor walk over several, and a ring of
# 7 or 8 stages is somewhere else at each one's start. 66 tiles, for those of more than 256 tokens.
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(
    "num_tokens, out_features, in_features",
    [(1100, 4224, 128), (1100, 4224, 896), (1100, 4224, 1152), (1100, 4224, 2048), (1000, 8448, 896)],
)
def test_blocks_that_walk_over_several_tiles(monkeypatch, group_size, num_tokens, out_features, in_features):
    problem = reference.random_problem(num_tokens, out_features, in_features, group_size, seed=in_features)
    expected = marlin_qqq_gemm(*problem.arguments).cuda()
    on_gpu = problem.to("cuda")
    for candidate in range(count_candidates(monkeypatch, on_gpu)):
        monkeypatch.setenv("MARLIN_QQQ_CANDIDATE", str(candidate))
        assert reference.same_bits(marlin_qqq_gemm(*on_gpu.arguments), expected), f"candidate {candidate}"


# 33 tiles of 128 features x 3 to 11 of tokens, 48 x 4 of more than 256: more than there are multiprocessors, most of
# them with a few left over.
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "num_tokens, out_features, in_features", [(700, 4224, 256), (700, 4224, 896), (700, 4224, 2048), (1000, 6144, 640)]
)
def test_tiles_that_clusters_share_after_whole_ones(
    monkeypatch, group_size, out_dtype, num_tokens, out_features, in_features
):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90 kernels run on Hopper only")
    problem = reference.random_problem(num_tokens, out_features, in_features, group_size, seed=in_features)
    bias = torch.randn(out_features).to(out_dtype)
    expected = marlin_qqq_gemm(*problem.arguments, bias=bias, out_dtype=out_dtype).cuda()
    on_gpu, bias = problem.to("cuda"), bias.cuda()
    _, candidates = ask_candidates(num_tokens, out_features, in_features, group_size, "cuda")
    names = [candidate.name for candidate in candidates if "rounds of whole tiles" in candidate.text]
    assert names
    for name in names:
        monkeypatch.setenv("MARLIN_QQQ_TILE", name)
        for _ in range(2):  # one after the other: nothing is left behind
            got = marlin_qqq_gemm(*on_gpu.arguments, bias=bias, out_dtype=out_dtype)
            assert reference.same_bits(got, expected), name


# One tile of 64 features more than multiprocessors, some after two whole rounds, and as many as make whole rounds; 16
# stages, one for each ring of a cluster, and numbers of stages that end elsewhere at every tile.
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("num_tokens", [1, 8, 13, 24, 31])
@pytest.mark.parametrize("rounds, left, in_features", [(1, 1, 2048), (2, 7, 2432), (2, 0, 3584)])
def test_rings_that_flow_from_tile_to_tile(monkeypatch, group_size, num_tokens, rounds, left, in_features):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90 kernels run on Hopper only")
    tiles = rounds * torch.cuda.get_device_properties(0).multi_processor_count + left
    problem = reference.random_problem(num_tokens, 64 * tiles, in_features, group_size, seed=left)
    bias = torch.randn(64 * tiles).half()
    expected = marlin_qqq_gemm(*problem.arguments, bias=bias).cuda()
    on_gpu, bias = problem.to("cuda"), bias.cuda()
    _, candidates = ask_candidates(num_tokens, 64 * tiles, in_features, group_size, "cuda")
    names = [candidate.name for candidate in candidates if candidate.tile_name.startswith("flow")]
    assert {name.partition("/")[2] for name in names} == ({"1x1/1", "2x1/1"} if left else {"1x1/1"})
    for name in names:
        monkeypatch.setenv("MARLIN_QQQ_TILE", name)
        for constant_weights in (False, True, True):  # one after the other: nothing is left behind
            got = marlin_qqq_gemm(*on_gpu.arguments, bias=bias, constant_weights=constant_weights)
            assert reference.same_bits(got, expected), f"{name}, constant_weights={constant_weights}"


# Whatever torch's allocator hands out: a few tiles left over after a whole round, and clusters' sums of one token.
@pytest.mark.parametrize("family", ["sm80", "sm90"])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("num_tokens, out_features, in_features", [(552, 2048, 256), (1, 512, 4096)])
def test_what_scratch_holds_does_not_matter(monkeypatch, family, group_size, num_tokens, out_features, in_features):
    if family == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90 kernels run on Hopper only")
    problem = reference.random_problem(num_tokens, out_features, in_features, group_size, seed=num_tokens)
    expected = marlin_qqq_gemm(*problem.arguments).cuda()
    on_gpu = problem.to("cuda")
    monkeypatch.setenv("MARLIN_QQQ_FAMILY", family)
    for candidate in range(count_candidates(monkeypatch, on_gpu)):
        monkeypatch.setenv("MARLIN_QQQ_CANDIDATE", str(candidate))
        torch.cuda.empty_cache()
        used = [torch.full((size << 20,), 0x55, dtype=torch.int8, device="cuda") for size in (1, 2, 4, 8, 16, 32)]
        del used
        assert reference.same_bits(marlin_qqq_gemm(*on_gpu.arguments), expected), f"candidate {candidate}"


@pytest.mark.parametrize("group_size", [128, -1])
def test_candidates_have_names_that_force_them(monkeypatch, group_size):
    problem = reference.random_problem(48, 320, 1024, group_size, seed=48).to("cuda")
    expected = marlin_qqq_gemm(*problem.arguments)
    device, candidates = ask_candidates(48, 320, 1024, group_size, "cuda")
    major, minor = torch.cuda.get_device_capability()
    assert device["compute_capability"] == 10 * major + minor
    assert device["num_sms"] == torch.cuda.get_device_properties(0).multi_processor_count
    assert len(candidates) == count_candidates(monkeypatch, problem)
    monkeypatch.delenv("MARLIN_QQQ_CANDIDATE")
    for candidate in candidates:
        monkeypatch.setenv("MARLIN_QQQ_TILE", candidate.name)
        assert reference.same_bits(marlin_qqq_gemm(*problem.arguments), expected), candidate.text


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("MARLIN_QQQ_FAMILY", "sm42", "MARLIN_QQQ_FAMILY must be sm80 or sm90, got sm42"),
        ("MARLIN_QQQ_SPLIT", "two", "MARLIN_QQQ_SPLIT must be an integer from 1 to 65535, got two"),
        ("MARLIN_QQQ_SPLIT", "0", "MARLIN_QQQ_SPLIT must be an integer from 1 to 65535, got 0"),
        ("MARLIN_QQQ_CANDIDATE", "-1", "MARLIN_QQQ_CANDIDATE must be an integer from 0 to .*, got -1"),
        ("MARLIN_QQQ_TILE", "no_such_tile", "no_such_tile"),
    ],
)
def test_bad_override_is_named(monkeypatch, variable, value, message):
    problem = reference.random_problem(3, 64, 128, 128).to("cuda")
    monkeypatch.setenv(variable, value)
    with pytest.raises((RuntimeError, ValueError), match=message):
        marlin_qqq_gemm(*problem.arguments)
    monkeypatch.delenv(variable)
    assert torch.isfinite(marlin_qqq_gemm(*problem.arguments)).any()
