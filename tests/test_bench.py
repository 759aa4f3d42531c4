"""The benches run, tell what is the same from what is not, and keep what they measured before."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import (
    common,
    convergence,
    families,
    family_report,
    family_step,
    ops,
    step,
    timing,
    train_step,
    training_run,
    vocabulary,
)
from bench.family_table import CASES


def rows_of(folder, pattern):
    (path,) = folder.glob(pattern)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_op_is_what_eager_code_is(tmp_path):
    ops.main(
        ["--device", "cpu", "--variants", "eager,liger-compile", "--rounds", "3", "--out", str(tmp_path)]
    )
    rows = rows_of(tmp_path, "ops_cpu.csv")
    assert {(row["op"], row["variant"]) for row in rows} == {
        (op, variant) for op in ops.OPS for variant in ("eager", "liger-compile")
    }
    for row in rows:
        assert float(row["median_ms"]) > 0 and row["timed_by"] == "wall" and not row["error"], row
        # Rounding in bfloat16; a wrong sign or factor differs by about 1.
        assert row["pass"] != "both" or float(row["difference"]) < 2e-2, row


def test_a_variant_that_fails_has_a_row_and_the_others_go_on(tmp_path, monkeypatch):

    def fails(x, weight):
        raise ValueError("not today")

    monkeypatch.setitem(ops.OPS["rms_norm"].variants, "eagerly", fails)
    arguments = ["rms_norm", "--device", "cpu", "--variants", "eagerly,liger-compile", "--rounds", "3"]
    ops.main([*arguments, "--out", str(tmp_path)])
    failed, measured = rows_of(tmp_path, "ops_cpu.csv")
    assert failed["variant"] == "eagerly" and failed["error"] == "ValueError: not today"
    assert measured["variant"] == "liger-compile" and float(measured["median_ms"]) > 0


def test_all_ways_to_an_odd_vocabulary_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "plain", torch.compiler.disable(vocabulary.plain))
    vocabulary.main(["--device", "cpu", "--rounds", "3", "--out", str(tmp_path)])
    rows = rows_of(tmp_path, "vocabulary_cpu.csv")
    assert {row["what"] for row in rows} == {"product", "dx", "dweight", "loss"} and len(rows) == 20
    for row in rows:
        assert float(row["median_ms"]) > 0 and (row["way"] == "round" or float(row["difference"]) < 2e-2), row


def test_a_floor_is_the_bytes_at_the_rate_of_the_copy_and_the_gemms():
    took = {"copy": 0.5, "product": 3.0, "dx": 5.0, "dweight": 7.0}
    floors = ops.floors_of(ops.OPS["linear_cross_entropy"], (2, 10, 1), took)
    assert floors == {"forward": 3, "backward": 12, "both": 15}
    floors = ops.floors_of(ops.OPS["rms_norm"], (2, 10), took)
    assert floors == {"forward": 20, "backward": 30, "both": 50}
    floors = ops.floors_of(ops.OPS["cross_entropy"], (2, 10), took)
    assert floors == {"forward": 10, "backward": 20, "both": 20}


def test_rows_replace_those_of_the_same_key(tmp_path):
    for rows in ([{"op": "a", "ms": 1}, {"op": "b", "ms": 2}], [{"op": "a", "ms": 3, "new": "x"}]):
        common.merge_csv("some.csv", rows, ("op",), tmp_path)
    assert rows_of(tmp_path, "some.csv") == [
        {"op": "b", "ms": "2", "new": ""},
        {"op": "a", "ms": "3", "new": "x"},
    ]


def test_contenders_take_turns():
    calls = []
    contenders = [
        timing.Contender(name, {"both": lambda name=name: calls.append(name)}, "wall") for name in "abc"
    ]
    found = timing.interleave(contenders, rounds=3, seconds=60)
    assert "".join(calls) == "abcbcacab"
    assert all(len(found[name]["both"]) == 3 for name in "abc")
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)


@pytest.mark.slow
def test_training_steps_agree(tmp_path):
    arguments = ["--model", "tiny", "--tokens", "2x16", "--layers", "1", "--device", "cpu", "--rounds", "2"]
    options = ["--variants", "eager,only rotary", "--options", '{"liger.inner": "aot_eager"}']
    train_step.main([*arguments, *options, "--out", str(tmp_path)])
    eager, rotary = rows_of(tmp_path, "train_step_cpu.csv")
    assert (eager["variant"], rotary["variant"]) == ("eager", "only rotary")
    assert (eager["replaced"], rotary["replaced"]) == ("0", "1")  # its one site, and no others
    for column in ("loss", "grad_norm"):
        assert float(rotary[column]) == pytest.approx(float(eager[column]), rel=1e-4)
    assert all(0 < float(row["forward_ms"]) < float(row["step_ms"]) for row in (eager, rotary))


def test_the_floor_of_a_step_is_all_its_gemms():
    flops = FlopCounterMode(display=False)
    floor = step.Floor(step.Case("tiny", "2x16", device="cpu"))
    with flops:
        floor.run_marked(lambda: None)
    # Two layers: q and o 64 x 64, k and v 64 x 32, three of 64 x 96; and the head.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 128
    assert flops.get_flop_counts()["Global"][torch.ops.aten.mm] == 3 * 2 * 32 * weights
    # A layer: two norms after additions, rotary of 6 heads of 16, the gate; then the last norm, loss and embedding.
    assert floor.elements == (
        32 * (2 * (2 * 4 * 64 + 2 * 6 * 16 + 3 * 96) + 2 * 64 + 2 * 128 + 2 * 64),
        32 * (2 * (2 * 4 * 64 + 2 * 6 * 16 + 6 * 96) + 3 * 64 + 64) + 128 * 64,
    )
    (forward,), (whole,) = floor.turn(1).values()
    assert 0 < forward < whole


@pytest.mark.parametrize("limit", [0, 5, 7, 8, 100, 2047, 2048, 9000])
def test_the_largest_that_fits_is_found_to_an_eighth(limit):
    tried = []

    def fits(count):
        tried.append(count)
        return count <= limit

    found = step.largest(fits, 8, 2048)
    assert found <= limit and len(tried) < 15 and max(tried) <= 2048
    assert found == min(limit, 2048) or limit < 8 or found > limit - max(limit // 8, 1)


def test_scale_is_measured_for_each_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(step.Step, "fits", lambda self, batch, length: batch * length <= 100)
    eager = step.Step(step.Case("tiny", "2x16", device="cpu"), step.VARIANTS["eager"])
    assert eager.scale() == {"longest": 96, "sequences": 6, "length": 16}


@pytest.mark.slow
def test_processes_at_once_take_turns(tmp_path):
    arguments = ["--model", "tiny", "--tokens", "2x16", "--layers", "1", "--device", "cpu", "--rounds", "1"]
    train_step.main([*arguments, "--variants", "floor,eager", "--at-once", "--out", str(tmp_path)])
    floor, eager = rows_of(tmp_path, "train_step_cpu.csv")
    assert "error" not in floor and float(eager["of_floor"]) > 0 and "compile_s" not in eager


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp", "loss-parallel"])
def test_processes_that_share_the_work_have_the_numbers_of_one(tmp_path, parallel):
    arguments = [
        "--model",
        "tiny",
        "--tokens",
        "2x16",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    train_step.main([*arguments, "--variants", "eager"])
    options = ["--variants", "floor,eager,liger-compile", "--options", '{"liger.inner": "aot_eager"}']
    options += ["--returns", "loss"] if parallel in ("tp", "loss-parallel") else []
    train_step.main([*arguments, *options, "--parallel", parallel])
    (alone,) = rows_of(tmp_path, "train_step_cpu.csv")
    rows = rows_of(tmp_path, "parallel_cpu.csv")
    assert [(row["parallel"], row["processes"]) for row in rows] == [(parallel, "2")] * 2
    assert int(rows[1]["replaced"]) > 0
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-4)
        norms = rows[0] if parallel in ("tp", "loss-parallel") else alone  # there, the head is not tied
        assert float(row["grad_norm"]) == pytest.approx(float(norms["grad_norm"]), rel=1e-4)


def test_what_fits_is_not_looked_for_in_several_processes(capsys):
    arguments = ["--model", "tiny", "--tokens", "2x16", "--device", "cpu", "--scale", "--parallel", "ddp"]
    with pytest.raises(SystemExit):
        train_step.main(arguments)
    assert "expected --scale or --parallel, got both" in capsys.readouterr().err


def test_curves_are_compared_with_what_rounding_does():
    curves = {
        name: [3.0, 2.0 + apart]
        for name, apart in zip(
            (convergence.EAGER, convergence.NUDGED, convergence.OTHER_WEIGHTS, convergence.OURS),
            (0.0, 0.01, 0.1, 0.015),
            strict=True,
        )
    }
    ours = convergence.compared(curves)[convergence.OURS]
    assert ours["of_nudged"] == pytest.approx(1.5) and ours["of_other_weights"] == pytest.approx(0.15)
    assert ours["max_difference"] == pytest.approx(2 * ours["mean_difference"]) == pytest.approx(0.015)


def test_the_vocabulary_of_a_text_loses_nothing():
    text = "def f(x):\n    return some_name + 'caf\u00e9 \u4f60'\n\n" * 3 + "rareword"
    vocabulary = convergence.Vocabulary(text, 256 + 12)
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert max(ids) < 256 + 12 and len(ids) < len(text)


def test_training_with_liger_converges_as_eager_does(tmp_path):
    arguments = ["--device", "cpu", "--model", "tiny", "--steps", "3", "--batch", "2x16"]
    assert convergence.main([*arguments, "--compiler", "aot_eager", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "convergence_cpu.csv")
    assert len(rows) == 5 * 3 and {row["step"] for row in rows} == {"0", "1", "2"}


TINY = ["--tiny", "--device", "cpu", "--compiler", "aot_eager", "--rounds", "1", "--at-once", "2"]


def families_rows(tmp_path, *arguments):
    families.main([*TINY, "--out", str(tmp_path), *arguments])
    return {(row["case"], row["variant"]): row for row in rows_of(tmp_path, "families_tiny_*.csv")}


def assert_measured(rows):
    for (case, _), row in rows.items():
        assert not row["error"] and float(row["median_ms"]) > 0, row
        stock = rows[case, "inductor"]
        assert float(row["grad_norm"]) == pytest.approx(float(stock["grad_norm"]), rel=0.02), row


def test_a_family_is_measured(tmp_path):
    """In a process of its own; the slow test compares it with others, and `played` ones run beside it."""
    rows = families_rows(tmp_path, "--cases", "llama-padded", "--variants", "liger-compile")
    (ours,) = rows.values()
    assert not ours["error"] and float(ours["median_ms"]) > 0, ours
    assert int(ours["replaced"]) > 0 and ours["tokens"] == "2x32"
    assert float(ours["loss"]) == pytest.approx(float(ours["eager_loss"]), rel=1e-2)


def test_a_variant_may_have_options():
    found = family_step.variant_of("liger-compile:outline=auto:skip=rotary+mlp")
    assert found.compile == {
        "backend": "liger",
        "options": {"liger.outline": "auto", "liger.skip": ("rotary", "mlp")},
    }
    assert family_step.variant_of("inductor") is family_step.VARIANTS["inductor"]
    for unknown in ("stock", "inductor:outline=auto"):
        with pytest.raises(LookupError, match=unknown):
            family_step.variant_of(unknown)


@pytest.mark.slow
def test_families_of_every_kind_are_measured(tmp_path):
    names = (
        "llama-padded",
        "llama-fp16-scaler",
        "llama-evaluation-logits",
        "llama-checkpointed",
        "bert",
        "t5",
        "qwen3-moe",
    )
    rows = families_rows(tmp_path, "--cases", ",".join(names), "--variants", "inductor,liger-compile")
    assert len(rows) == 2 * len(names)
    assert_measured(rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_has_a_step(case):
    if case.name.startswith("lora"):
        pytest.importorskip("peft")
    step = family_step.FamilyStep(case, family_step.Variant(None), "cpu", family_step.INDUCTOR, tiny=True)
    found = step.first()
    assert "error" not in found and found["loss"] > 1
    assert bool(step.settled()["grad_norm"]) == case.is_trained


def test_families_are_many_and_have_different_names():
    assert len({case.name for case in CASES}) == len(CASES) >= 26


def test_a_wrong_loss_is_not_timed():
    case = families.BY_NAME["llama-tied"]
    step = family_step.FamilyStep(case, family_step.Variant(None), "cpu", family_step.INDUCTOR, tiny=True)
    assert "error" not in step.first()
    for wrong in (12.0, float("nan")):
        step.eager_loss = wrong
        assert "not timed: expected the loss of eager code" in step.first()["error"]


# A process of a variant that writes what it does into a file, and does what the name of its variant says.
PLAYED = """
import json, os, subprocess, sys, time
log, case, variant, ways = *sys.argv[1:4], json.loads(sys.argv[4])
way = ways.get(variant, "") if case == "gpt2" else ""
def does(what, answer=None):
    with open(log, "a") as file:
        file.write(f"{case} {variant} {what}\\n")
    if answer is not None:
        print(json.dumps(answer), flush=True)
does("begins")
if way in ("dies", "hangs"):
    subprocess.Popen(["sleep", "600"])  # which holds the pipe of the answers too
    time.sleep(600 if way == "hangs" else 0)
    sys.exit("it is dead")
time.sleep(0.2)
does("is ready", {"again": "out of memory"} if way == "again" else {"loss": 1.0, "first_s": 2.0})
for line in sys.stdin:
    if way == "dies later" and line.strip() != "settle":
        os.abort()
    settled = {"step_s": 0.05, "peak_mib": 10}
    answers = {"settle": settled, "again": {"loss": 1.0}}
    does("is asked", answers.get(line.strip(), {"step_ms": [1.0, 3.0], "forward_ms": [1.0, 1.0]}))
"""


def played(tmp_path, monkeypatch, ways, *arguments):
    """The rows, and what the processes did, one after the other, where they do in `gpt2` what `ways` says."""
    log = tmp_path / "log"

    def command(case, variant, plan):
        return [sys.executable, "-c", PLAYED, str(log), case, variant, json.dumps(ways)]

    monkeypatch.setattr(families, "command_of", command)
    rows = families_rows(tmp_path, *arguments)
    return rows, log.read_text().splitlines()


def test_a_family_that_fails_makes_no_other_one_wait(tmp_path, monkeypatch):
    ways = {
        "inductor-again": "hangs",
        "liger-kernel": "dies",
        "liger-kernel-eager": "dies later",
        "inductor": "again",
    }
    begin = time.monotonic()
    rows, _ = played(tmp_path, monkeypatch, ways, "--cases", "gpt2,bert", "--patience", "2", "--rounds", "3")
    assert time.monotonic() - begin < 60
    errors = {variant: row["error"] for (case, variant), row in rows.items() if case == "gpt2"}
    assert errors.pop("inductor-again") == "the first step took too long"
    assert errors.pop("liger-kernel") == "it is dead"
    assert "ended with -6" in errors.pop("liger-kernel-eager")
    assert errors == {"inductor": "", "liger-compile": ""}
    for key in (
        ("gpt2", "liger-compile"),
        ("gpt2", "inductor"),
        *(("bert", name) for name in family_step.VARIANTS),
    ):
        assert (rows[key]["median_ms"], rows[key]["of_inductor"], rows[key]["steps"]) == (
            "2.0",
            "1.0",
            "6",
        ), key
    assert rows["gpt2", "inductor"]["first_s"] == ""  # of another try, which had less to do


def test_families_are_measured_when_nothing_compiles(tmp_path, monkeypatch):
    _, done = played(tmp_path, monkeypatch, {}, "--cases", "gpt2,bert,t5", "--batch", "2")
    compiling = Counter()
    for line in done:
        what = line.split(" ", 2)[2]
        compiling += Counter({"begins": 1}) if what == "begins" else Counter()
        compiling -= Counter({"begins": 1}) if what == "is ready" else Counter()
        assert compiling["begins"] <= 2
        assert what != "is asked" or not compiling["begins"], done
    first_of_third = done.index(next(line for line in done if line.startswith("t5")))
    assert all(line.startswith("t5") for line in done[first_of_third:])  # when the first two have ended


def test_families_end_in_time_with_what_they_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "MEASURING", 1)
    arguments = ["--cases", "bert,gpt2", "--batch", "2", "--limit", "5", "--at-once", "8"]
    rows, _ = played(tmp_path, monkeypatch, {"liger-compile": "hangs"}, *arguments)
    assert {case for case, _ in rows} == {"bert"}
    assert "not measured for lack of time: --cases gpt2" in capsys.readouterr().out
    families.main([*TINY, "--cases", "t5,vit,bert,gpt2", "--part", "2/2", "--limit", "0"])
    assert "not measured for lack of time: --cases vit,gpt2" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--cases", "gpt1"], ["--part", "3/2"], ["--variants", "fast"]])
def test_families_that_do_not_exist_are_not_measured(arguments, capsys):
    with pytest.raises(SystemExit):
        families.main(arguments)
    assert "expected " in capsys.readouterr().err


def test_the_table_of_families_says_what_breaks_a_promise():
    def row(case, variant, time, peak, error=""):
        return {
            "case": case,
            "variant": variant,
            "tokens": "2x32",
            "first_s": "9.0",
            "error": error,
            "median_ms": time,
            "of_inductor": time,
            "peak_mib": peak,
            "peak_of_inductor": peak,
        }

    rows = [
        *(row("gpt2", "inductor", "1.0", "1.0"), row("gpt2", "inductor-again", "0.99", "1.0")),
        *(row("gpt2", "liger-kernel", "0.9", "0.4"), row("gpt2", "liger-compile", "1.009", "0.5")),
        *(row("bert", "inductor", "1.0", "1.0"), row("bert", "liger-compile", "1.009", "1.1")),
        *(row("t5", "inductor", "1.0", "1.0"), row("t5", "liger-compile", "", "", "no memory")),
    ]
    page = family_report.page(rows)
    assert "| gpt2 | 2x32 | 1.0 | 0.99 | 0.9 |  | 1.009 | 1.0 | 0.4 |  | 0.5 | 9.0 | 9.0 |" in page
    assert "[1] no memory" in page and "| t5 | 2x32 | 1.0 |  |  |  | [1] |" in page
    for sentence in (
        'backend="liger" fails: t5 (no memory)',
        "slower than stock torch.compile: bert (1.009)",  # for gpt2, two runs of stock differ as much
        "higher peak than stock torch.compile: bert (1.1)",
        "slower than liger-kernel: gpt2 (1.121)",
        "higher peak than liger-kernel: gpt2 (1.25)",
    ):
        assert f"- {sentence}" in page.splitlines(), page


@pytest.mark.gpu
def test_a_graph_is_not_faster_than_the_memory(tmp_path):
    """A pass over buffers that are in no cache; what took less than the copy of its bytes was not measured."""
    ops.main(["rms_norm", "--quick", "--variants", "eager,liger-compile", "--out", str(tmp_path)])
    rows = rows_of(tmp_path, "ops_*.csv")
    measured = {(row["variant"], row["pass"]): row for row in rows}
    for variant in ("eager", "liger-compile"):
        for pass_name in ("forward", "backward"):
            row = measured[variant, pass_name]
            assert row["timed_by"] == "graph" and float(row["of_floor"]) > 0.9, row


def test_all_tiles_of_rotary_compute_the_same(tmp_path, interpreted):
    from bench import rotary_tiles as tiles  # it needs Triton

    tiles.main(["--tiles", "4 warps, 4 heads, 2", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    rows = rows_of(tmp_path, "rotary_tiles_cpu.csv")
    assert [row["op"] for row in rows if row["tile"] == "config"] == ["rotary", "norm_rotary"]
    for row in rows:
        assert not row["error"] and float(row["difference"]) < 1e-2 and float(row["forward_us"]) > 0, row


@pytest.mark.slow
def test_a_training_run_that_is_resumed_is_the_same(tmp_path):
    """In two processes; the second run goes on from what was saved, in new processes."""
    curves = {}
    for save_every in (4, 2):
        folder = tmp_path / str(save_every)
        size = [
            "--device",
            "cpu",
            "--model",
            "tiny",
            "--batch",
            "2x16",
            "--steps",
            "4",
            "--compiler",
            "aot_eager",
        ]
        saved = ["--save-every", str(save_every), "--out", str(folder)]
        training_run.main([*size, *saved, "--variants", "inductor,liger-compile"])
        for row in rows_of(folder, "training_curve_cpu.csv"):
            curves.setdefault(row["variant"], {}).setdefault(save_every, []).append(float(row["loss"]))
    for curve in curves.values():
        assert curve[4] == pytest.approx(curve[2], rel=1e-5) and len(curve[2]) == 4
        assert curve[2][3] < curve[2][0]
    assert curves["inductor"][2] == pytest.approx(curves["liger-compile"][2], rel=1e-4)
