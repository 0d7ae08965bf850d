"""The benchmark's arithmetic: shapes, floors, launches, saved runs, comparison, cliffs. No timing here."""

from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlin_qqq import packing
from marlin_qqq._files import check_writable, write_text_atomically
from marlin_qqq.bench import environment, presets, problem, results
from marlin_qqq.bench.compare import compare_runs
from marlin_qqq.bench.problem import Ceilings, GemmProblem, quantize_bytes
from marlin_qqq.bench.results import SCHEMA_VERSION, Measurement, Run, load_run
from marlin_qqq.bench.sweep import cliffs_of_run, find_cliffs
from marlin_qqq.bench.tables import find_baseline, speed_up
from marlin_qqq.bench.timing import num_copies, num_launches, summarise
from marlin_qqq.bench.tune import tune_results


def measured(tokens: int, median: float, **fields: object) -> Measurement:
    values: dict[str, object] = {
        "operation": "gemm",
        "implementation": "marlin_qqq",
        "num_tokens": tokens,
        "out_features": 4096,
        "in_features": 4096,
        "group_size": 128,
        "median_us": median,
        "p10_us": median * 0.99,
        "p90_us": median * 1.01,
        "check": "exact (test)",
    }
    return Measurement(**(values | fields))  # type: ignore[arg-type]


# Presets


def test_llama_shapes_and_their_tensor_parallel_cuts():
    assert [layer.shape for layer in presets.model_layers("llama-3.1-70b")] == [
        "10240x8192",
        "8192x8192",
        "57344x8192",
        "8192x28672",
    ]
    assert [layer.shape for layer in presets.model_layers("llama-3.1-70b", 8)] == [
        "1280x8192",
        "8192x1024",
        "7168x8192",
        "8192x3584",
    ]


def test_key_value_heads_are_replicated_when_there_are_fewer_than_ranks():
    qkv = presets.model_layers("llama-3.1-405b", 16)[0]
    assert qkv.out_features == (128 // 16 + 2 * 1) * 128


@pytest.mark.parametrize("model", presets.MODELS)
def test_every_model_is_within_the_formats_limits_on_one_gpu(model):
    layers = presets.model_layers(model)
    assert [layer.name for layer in layers] == ["qkv", "o", "gate_up", "down"]
    assert all(layer.out_features % 64 == 0 and layer.in_features % 128 == 0 for layer in layers)


@pytest.mark.parametrize(
    ("model", "tensor_parallel", "message"),
    [
        ("gpt-5", 1, "unknown model 'gpt-5'"),
        ("llama-3.1-8b", 3, "does not divide llama-3.1-8b's 32 heads"),
        ("llama-3.1-8b", 0, "tensor parallel size 0"),
        ("qwen2.5-72b", 2, "in_features of down is 14784; it must be a positive multiple of 128"),
    ],
)
def test_refused_presets_say_why(model, tensor_parallel, message):
    with pytest.raises(ValueError, match=message):
        presets.model_layers(model, tensor_parallel)


@pytest.mark.parametrize("text", ["4096", "4096x", "4096x100", "100x128", "0x128", "axb", "1x2x3"])
def test_refused_shapes(text):
    with pytest.raises(ValueError, match=r"NxK|multiple"):
        presets.parse_shape(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [("1,16, 4", [1, 4, 16]), ("1:5", [1, 2, 3, 4, 5]), ("8:32:8,8", [8, 16, 24, 32]), ("7", [7])],
)
def test_integer_lists(text, values):
    assert presets.parse_integers(text) == values


@pytest.mark.parametrize("text", ["", ",", "a", "1:2:3:4", "1:4:0", "5:1", "1:100000000000"])
def test_refused_integer_lists(text):
    with pytest.raises(ValueError):
        presets.parse_integers(text)


def test_the_formats_numbers_are_packings():
    """And shapes and floors do not load torch for them."""
    script = "import sys, marlin_qqq.bench.presets, marlin_qqq.bench.problem; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    assert (problem.GROUP_128, problem.PER_CHANNEL) == (packing.GROUP_SIZE, packing.PER_CHANNEL)
    assert presets.OUT_FEATURES_MULTIPLE == packing.OUT_FEATURES_MULTIPLE
    assert presets.IN_FEATURES_MULTIPLE == packing.IN_FEATURES_MULTIPLE


# Problems and floors


@pytest.mark.parametrize(
    ("shape", "tokens", "floor"),
    # Bytes over 4.6 TB/s or operations over 1910 TOPS, worked out by hand.
    [("8192x21760", 1, 19.4), ("8192x21760", 1024, 191.1), ("28672x4096", 256, 31.5), ("4096x4096", 4096, 72.0)],
)
def test_floor(shape, tokens, floor):
    layer = presets.parse_shape(shape)
    problem = GemmProblem(tokens, layer.out_features, layer.in_features)
    assert Ceilings(4600.0, "", 1910.0, "").floor_us(problem.bytes_moved, problem.operations) == pytest.approx(
        floor, abs=0.06
    )


def test_no_floor_without_both_ceilings():
    assert Ceilings(4600.0, "", None, "").floor_us(1e6, 1e6) is None
    assert Ceilings(None, "", 1910.0, "").floor_us(1e6, 1e6) is None


def test_group_scales_count_as_bytes():
    channel, group = (GemmProblem(1, 4096, 4096, size).bytes_moved for size in (-1, 128))
    assert group - channel == 2 * 4096 * 4096 // 128


@pytest.mark.parametrize(("group_size", "scale_bytes"), [(-1, 4 * 192 + 4 * 3), (128, 4 * 192 + 2 * 2 * 192 + 4 * 3)])
def test_every_byte_that_a_product_moves_is_counted_once(group_size, scale_bytes):
    problem = GemmProblem(3, 192, 256, group_size)
    codes, activations, output = 192 * 256 // 2, 3 * 256, 2 * 3 * 192
    assert problem.bytes_moved == codes + scale_bytes + activations + output
    assert problem.operations == 2 * 3 * 192 * 256


def test_quantize_moves_three_bytes_a_value():
    assert quantize_bytes(10, 4096) == 3 * 10 * 4096 + 40


@given(st.integers(1, 10**9), st.integers(0, 10**8), st.floats(0.0, 1e5))
def test_a_graph_rotates_over_more_than_three_times_l2(bytes_per_copy, l2_bytes, expected_us):
    copies = num_copies(bytes_per_copy, l2_bytes)
    assert copies >= 2
    assert copies * bytes_per_copy > 3 * l2_bytes
    launches = num_launches(copies, expected_us)
    assert launches % copies == 0
    assert launches >= max(copies, 10)
    assert launches >= 400 or launches * expected_us >= 250 or expected_us < 0.5


@pytest.mark.parametrize(
    ("copies", "expected_us", "launches"), [(2, 1e4, 10), (3, 1e4, 12), (2, 10.0, 26), (5, 2.5, 100), (31, 1e4, 31)]
)
def test_a_graph_has_ten_launches_or_250_us(copies, expected_us, launches):
    assert num_launches(copies, expected_us) == launches


def test_copies_are_the_fewest_that_exceed_three_times_l2():
    assert [num_copies(size, 1000) for size in (99, 100, 101, 1500, 3001)] == [31, 31, 30, 3, 2]


def test_percentiles():
    sample = summarise([float(value) for value in range(101)], 12)
    assert (sample.median_us, sample.p10_us, sample.p90_us) == (50.0, 10.0, 90.0)
    assert (sample.num_samples, sample.launches_per_sample) == (101, 12)


# Saved runs


def test_a_run_survives_saving(tmp_path):
    run = Run(
        environment={"gpu": {"name": "X"}, "torch": "2.11"},
        settings={"replays": 3},
        ceilings={"read_gbps": 1.5},
        measurements=[measured(1, 2.5, extra={"plan": "a"}), measured(2, 1.0, unavailable="why")],
        notes=["a note"],
    )
    path = tmp_path / "folder" / "run.json"
    write_text_atomically(path, run.to_json())
    assert load_run(path) == run
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_text_atomically(path, "old")
    monkeypatch.setattr("marlin_qqq._files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode, "as readable as any file of the user's"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "run.json")
    for text in ("new", "newer"):  # the link leads nowhere at first
        write_text_atomically(tmp_path / "link.json", text)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "real" / "run.json").read_text() == text


def test_pipes_are_written_into_and_stay(tmp_path):
    """And devices: as root a rename would put a file in the place of /dev/null. No test touches that one."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        check_writable(path)
        write_text_atomically(path, "text")
        assert os.read(reader, 100) == b"text" and stat.S_ISFIFO(pipe.lstat().st_mode) and link.is_symlink()
    os.close(reader)


@pytest.mark.parametrize("name", ["link", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_keeps_what_is_printed_around(tmp_path, name):
    """Also where it is a file. The link is one like /dev/stdout, which no test touches: a bug would replace it."""
    if name == "link":
        name = str(tmp_path / "link")
        os.symlink("/proc/self/fd/1", name)
    script = (
        "from marlin_qqq._files import write_text_atomically\n"
        f"print('before'); write_text_atomically({name!r}, 'text\\n'); print('after')"
    )
    with (tmp_path / "out.txt").open("w") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True, timeout=60)
    assert (tmp_path / "out.txt").read_text() == "before\ntext\nafter\n"


def test_the_umask_decides_who_reads_a_file(tmp_path):
    before = os.umask(0o077)
    try:
        write_text_atomically(tmp_path / "mine.json", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine.json").stat().st_mode) == 0o600


def test_what_cannot_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "folder" / "run.json")
    assert list((tmp_path / "folder").iterdir()) == []
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OSError, match="/proc"):
        check_writable("/proc/x.csv")


VALID_ROW = {
    "operation": "gemm", "implementation": "marlin_qqq", "num_tokens": 1, "out_features": 64, "in_features": 128,
    "group_size": 128, "median_us": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_us": "fast"}, r"measurement 1: median_us is 'fast'; float \| None is needed"),
        ({"median_us": -1.0}, "median_us is -1.0, too small"),
        ({"median_us": float("nan")}, "holds NaN"),
        ({"median_us": True}, "median_us is True"),
        ({"num_tokens": 0}, "num_tokens is 0, too small"),
        ({"num_tokens": 10**400}, r"num_tokens is 1000.*\.\.\..*000; int is needed"),
        ({"num_tokens": None}, "num_tokens is None; int is needed"),
        ({"implementation": ["a"]}, r"implementation is \['a'\]; str is needed"),
        ({"check": None}, "check is None; str is needed"),
        ({"extra": []}, r"extra is \[\]; dict"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_other_types_are_refused_by_name(tmp_path, change, message):
    document = json.loads(Run().to_json())
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document | {"measurements": [VALID_ROW]}))
    assert load_run(path).measurements[0].median_us == 1.0
    path.write_text(json.dumps(document | {"measurements": [VALID_ROW | change]}))
    with pytest.raises(ValueError, match=message):
        load_run(path)


@pytest.mark.parametrize(
    "change",
    [
        {"environment": []},
        {"environment": {"gpu": "abc"}},
        {"ceilings": {"read_gbps": "fast"}},
        {"measurements": {"a": 1}},
        {"measurements": ["a"]},
        {"notes": [1]},
    ],
    ids=str,
)
def test_documents_of_another_form_are_refused(change):
    with pytest.raises(ValueError, match=r"^here"):
        Run.from_json(json.dumps(json.loads(Run().to_json()) | change), "here")


def test_documents_that_no_parser_takes_are_refused():
    for text in ("[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError, match="here is not JSON"):
            Run.from_json(text, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a result"),
        ('{"schema": "other"}', "not a result"),
        ('{"schema": "marlin-qqq-bench", "schema_version": 99}', "schema version 99"),
        ('{"schema": "marlin-qqq-bench", "schema_version": 1}', "misses a part"),
        (
            '{"schema": "marlin-qqq-bench", "schema_version": 1, "environment": {}, "settings": {}, "ceilings": {}, '
            '"measurements": [{"operation": "gemm"}]}',
            "misses a part",
        ),
    ],
)
def test_files_that_are_no_runs_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


def test_a_gzipped_run_is_read(tmp_path):
    run = Run(measurements=[measured(1, 2.5)])
    path = tmp_path / "run.json.gz"
    path.write_bytes(gzip.compress(run.to_json().encode()))
    assert load_run(path) == run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}" * 1000)[:-9], "ended before"),
        (gzip.compress(b"{}")[:-5] + b"\0\0\0\0\0", "CRC|Incorrect length"),
        (b"\x1f\x8b not gzip", "compression method"),
        (gzip.compress(b"\xff\xfe"), "utf-8"),
    ],
    ids=["cut off", "checksum", "no gzip", "no text"],
)
def test_damaged_gzip_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "x.json.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.json\.gz cannot be read.*({message})"):
        load_run(path)


def test_gzip_of_more_than_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "MOST_BYTES", 1000)
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(b" " * 1001))
    with pytest.raises(ValueError, match=r"x\.json\.gz cannot be read: it holds more than 1000 bytes"):
        load_run(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no\.json cannot be read"):
        load_run(tmp_path / "no.json")


def test_csv_has_a_row_a_measurement_with_derived_columns():
    run = Run(measurements=[measured(1, 2.0, operations=4_000_000, bytes_moved=8_000, floor_us=1.0), measured(2, 3.0)])
    header, first, _ = run.to_csv().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert (float(row["tops"]), float(row["gbps"]), float(row["percent_of_floor"])) == (2.0, 4.0, 50.0)


def test_a_baseline_is_found_in_the_same_mode_or_without_one():
    ours = measured(16, 10.0)
    other_mode = measured(16, 1.0, implementation="humming", group_size=-1)
    same_mode = measured(16, 20.0, implementation="humming")
    modeless = measured(16, 30.0, implementation="fp16", group_size=None)
    other_size = measured(17, 1.0, implementation="fp16", group_size=None)
    rows = [other_mode, same_mode, other_size, modeless]
    assert speed_up(ours, find_baseline(rows, ours, "humming")) == 2.0
    assert speed_up(ours, find_baseline(rows, ours, "fp16")) == 3.0
    assert speed_up(ours, find_baseline(rows, ours, "fp8")) is None


# Comparison


def test_only_changes_beyond_threshold_and_noise_count():
    before = Run(measurements=[measured(1, 10.0), measured(2, 10.0, p90_us=14.0), measured(3, 10.0), measured(4, 10.0)])
    after = Run(measurements=[measured(1, 12.0), measured(2, 12.0), measured(3, 10.1), measured(4, 8.0)])
    comparison = compare_runs(before, after)
    verdicts = {change.after.num_tokens: change.verdict for change in comparison.changes}
    assert verdicts == {1: "slower", 2: "same", 3: "same", 4: "faster"}
    assert [change.after.num_tokens for change in comparison.regressions] == [1]


@pytest.mark.parametrize(
    ("after_us", "verdict"), [(10.21, "slower"), (10.19, "same"), (10 / 1.019, "same"), (10 / 1.021, "faster")]
)
def test_two_per_cent_are_noise(after_us, verdict):
    before, after = (
        Run(measurements=[measured(1, us, p10_us=us * 0.9999, p90_us=us * 1.0001)]) for us in (10.0, after_us)
    )
    assert [change.verdict for change in compare_runs(before, after).changes] == [verdict]


@pytest.mark.parametrize(("fp16_us", "ours_us", "verdict"), [(50.0, 6.0, "slower"), (200.0, 16.0, "faster")])
def test_noise_is_corrected_for_the_reference_as_medians_are(fp16_us, ours_us, verdict):
    """The device became twice as fast, or slow, and our op changed by 20 % beside it: more than its noise."""

    def run(fp16: float, ours: float) -> Run:
        return Run(measurements=[measured(1, fp16, implementation="fp16", group_size=None), measured(1, ours)])

    changes = compare_runs(run(100.0, 10.0), run(fp16_us, ours_us), relative_to="fp16").changes
    assert {change.after.implementation: change.verdict for change in changes} == {
        "fp16": "same",
        "marlin_qqq": verdict,
    }


def test_comparison_relative_to_a_baseline_cancels_a_slower_device():
    def run(factor: float, ours: float) -> Run:
        fp16 = measured(1, 100.0 * factor, implementation="fp16", group_size=None)
        return Run(measurements=[fp16, measured(1, ours * factor)], environment={"gpu": {"name": f"x{factor}"}})

    comparison = compare_runs(run(1.0, 10.0), run(1.5, 10.0), relative_to="fp16")
    assert all(change.verdict == "same" for change in comparison.changes)
    assert comparison.warnings == []
    plain = compare_runs(run(1.0, 10.0), run(1.5, 10.0))
    assert [change.verdict for change in plain.changes] == ["slower", "slower"]
    assert "the GPU differs" in plain.warnings[0]


def test_comparison_reports_what_is_new_gone_or_newly_wrong():
    wrong = measured(3, 1.0, check="WRONG: 1 value", median_us=None)
    comparison = compare_runs(
        Run(measurements=[measured(1, 1.0), measured(3, 1.0)]), Run(measurements=[measured(2, 1.0), wrong])
    )
    assert [m.num_tokens for m in comparison.only_before] == [1]
    assert [m.num_tokens for m in comparison.only_after] == [2]
    assert comparison.newly_wrong == [wrong]


# Cliffs


def test_a_step_dearer_than_its_work_is_a_cliff():
    rows = [measured(tokens, 10.0 if tokens <= 64 else 15.0, floor_us=5.0) for tokens in range(60, 70)]
    (cliff,) = find_cliffs(rows)
    assert (cliff.kind, cliff.before.num_tokens, cliff.after.num_tokens) == ("step", 64, 65)
    assert cliff.ratio == pytest.approx(1.5)


def test_a_step_that_the_work_explains_is_none():
    assert find_cliffs([measured(64, 10.0, floor_us=10.0), measured(128, 20.0, floor_us=20.0)]) == []


def test_a_larger_batch_that_is_faster_is_an_inversion():
    rows = [measured(tokens, time) for tokens, time in ((1, 10.0), (2, 10.2), (3, 12.0), (4, 10.0), (5, 10.1))]
    kinds = [(cliff.kind, cliff.before.num_tokens, cliff.after.num_tokens) for cliff in find_cliffs(rows)]
    assert ("inversion", 3, 4) in kinds
    assert len([kind for kind, _, _ in kinds if kind == "inversion"]) == 1


@pytest.mark.parametrize(
    ("floors", "after_us", "kinds"),
    [
        ((5.0, 5.0), 10.59, []),
        ((5.0, 5.0), 10.61, ["step"]),
        ((5.0, 10.0), 21.1, []),  # the floor's growth explains twice the time
        ((5.0, 10.0), 21.3, ["step"]),
        ((5.0, 5.0), 10 / 1.029, []),
        ((5.0, 5.0), 10 / 1.031, ["inversion"]),
    ],
)
def test_steps_of_six_and_inversions_of_three_per_cent_count(floors, after_us, kinds):
    rows = [
        measured(tokens, us, floor_us=floor, p10_us=us * 0.9999, p90_us=us * 1.0001)
        for tokens, us, floor in zip((64, 65), (10.0, after_us), floors, strict=True)
    ]
    assert [cliff.kind for cliff in find_cliffs(rows)] == kinds


def test_noise_is_no_cliff():
    noisy = measured(65, 15.0, p10_us=9.0)
    assert find_cliffs([measured(64, 10.0), noisy]) == []


def test_cliffs_are_looked_for_within_one_curve_only():
    rows = [measured(64, 10.0), measured(65, 30.0, group_size=-1), measured(65, 40.0, in_features=8192)]
    assert cliffs_of_run(Run(measurements=rows)) == []
    assert (
        len(cliffs_of_run(Run(measurements=[*rows, replace(rows[0], num_tokens=65, median_us=30.0, p10_us=29.0)]))) == 1
    )


# Tuning


def test_the_planners_choice_is_compared_with_the_best_candidate_of_its_problem():
    rows = [
        measured(1, 12.0),
        measured(1, 10.0, implementation="marlin_qqq:tile:warp8/1x1/1"),
        measured(1, 15.0, implementation="marlin_qqq:tile:quad8/1x1/1"),
        measured(1, 1.0, implementation="marlin_qqq:tile:wrong/1x1/1", median_us=None),
        measured(1, 1.0, implementation="fp16", group_size=None),
        measured(1, 7.0, group_size=-1),
        measured(2, 8.0),
        measured(2, 9.0, implementation="marlin_qqq:tile:warp8/1x1/1"),
        measured(3, 9.0, implementation="marlin_qqq:tile:warp8/1x1/1"),  # its problem's own choice was not timed
    ]
    results = tune_results(rows)
    assert [(result.chosen, result.best) for result in results] == [(rows[0], rows[1]), (rows[5],) * 2, (rows[6],) * 2]
    assert [result.loss for result in results] == [1.2, 1.0, 1.0]


# Where a run was made


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("MARLIN_QQQ_COMMIT", "0123abc")
    described = environment.describe_environment("cpu")
    assert (described["commit"], described["uncommitted_changes"]) == ("0123abc", None)
    monkeypatch.delenv("MARLIN_QQQ_COMMIT")
    assert environment.describe_environment("cpu")["commit"] != "0123abc"


@pytest.mark.parametrize(
    ("visible", "torch_index", "index"),
    [(None, 1, 1), ("", 1, 1), ("3", 0, 3), ("2, 5", 1, 5), ("2,5", 2, 2), ("GPU-1a2b,GPU-3c4d", 1, 1)],
)
def test_clocks_are_those_of_the_gpu_that_torch_sees(monkeypatch, visible, torch_index, index):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    queries = []
    monkeypatch.setattr(environment, "_run", lambda command: queries.append(command) or "")
    environment._nvidia_smi(torch_index)
    assert queries[0][-2:] == ["-i", str(index)]
