"""The report: from nodes to text, to dictionaries, to logs; and explain(), which runs a model for it."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from liger_compile.pattern import Decision, Match, NearMiss, Pattern
from liger_compile.report import GraphReport, clear_reports, record, render, reports
from liger_compile.report.explain import explain


class LlamaRMSNorm: ...


class LlamaMLP: ...


class LlamaForCausalLM: ...


def stack(*modules: tuple[str, type]) -> dict[str, tuple[str, type]]:
    """What Dynamo puts into node.meta["nn_module_stack"]."""
    return {str(number): module for number, module in enumerate(modules)}


def layer_graph(layers: int) -> fx.GraphModule:
    """x -> (mul, mul_1) for every layer: two nodes that pretend to be a norm, with the metadata of Dynamo."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for layer in range(layers):
        for number in (65, 66):
            x = graph.call_function(torch.ops.aten.mul.Tensor, (x, x))
            x.meta["example_value"] = FakeTensorMode().from_tensor(
                torch.zeros(2, 8, 32, dtype=torch.bfloat16)
            )
            x.meta["nn_module_stack"] = stack(
                ("L['self']", LlamaForCausalLM), (f"L['self'].model.layers.{layer}.norm", LlamaRMSNorm)
            )
            x.meta["stack_trace"] = (
                '  File "/home/me/train.py", line 3, in step\n    loss = model(ids)\n'
                f'  File "/site/modeling_llama.py", line {number}, in forward\n'
                "    return self.weight * hidden_states\n           ^^^^^^^^^^^\n"
            )
    graph.output((x,))
    return fx.GraphModule(nn.Module(), graph)


def pattern(name: str) -> Pattern:
    return Pattern(name, search=lambda x: x, replace=lambda x: x, examples={"x": torch.zeros(2)})


def matches(gm: fx.GraphModule, name: str) -> list[Match]:
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    one = pattern(name)
    return [
        Match(one, {}, (second,), (first, second))
        for first, second in zip(nodes[::2], nodes[1::2], strict=True)
    ]


def lines_of(report: GraphReport) -> list[str]:
    return str(report).splitlines()


# Text.


def test_layers_are_folded_into_one_group():
    gm = layer_graph(layers=4)
    decisions = [
        Decision(match, "replace", saved_bytes=512 * 1024, inserted=match.outputs)
        for match in matches(gm, "rms_norm.llama")
    ]
    assert lines_of(GraphReport.of(gm, decisions, seconds=0.25)) == [
        "liger_compile  graph ?, 10 nodes: 4 replaced, 0 left alone, 0 near misses; "
        "2.0 MiB less kept for backward (0.25 s)",
        "",
        "Replaced",
        "  rms_norm.llama   4x   2.0 MiB   model.layers.{0..3}.norm (LlamaRMSNorm)",
        "                                  modeling_llama.py:66  -> aten::mul.Tensor  bf16[2, 8, 32]",
    ]


def test_sites_left_alone_have_a_reason_and_save_nothing():
    gm = layer_graph(layers=3)
    first, second, third = matches(gm, "rms_norm.llama")
    reason = "the weight is changed between the norm and its use, so the norm has to be computed where it is"
    decisions = [
        Decision(first, "replace"),
        Decision(second, "annotate", "Inductor fuses this norm with its neighbors", saved_bytes=100),
        Decision(third, "leave", reason, saved_bytes=10**9),
    ]
    report = GraphReport.of(gm, decisions)
    assert lines_of(report) == [
        "liger_compile  graph ?, 8 nodes: 1 replaced, 1 marked for recompute, 1 left alone, 0 near misses; "
        "100 B less kept for backward",
        "",
        "Replaced",
        "  rms_norm.llama   1x      model.layers.0.norm (LlamaRMSNorm)",
        "                           modeling_llama.py:66  bf16[2, 8, 32]",
        "",
        "Left to Inductor, marked as cheap to recompute",
        "  rms_norm.llama   1x   100 B   model.layers.1.norm (LlamaRMSNorm)",
        "                                modeling_llama.py:66  bf16[2, 8, 32]",
        "      Inductor fuses this norm with its neighbors",
        "",
        "Left alone",
        "  rms_norm.llama   1x      model.layers.2.norm (LlamaRMSNorm)",
        "                           modeling_llama.py:66  bf16[2, 8, 32]",
        f"      {reason}",
    ]


def test_near_misses_show_the_line_that_differs_nearest_first():
    gm = layer_graph(layers=2)
    one, two, three, four = (node for node in gm.graph.nodes if node.op == "call_function")
    far = NearMiss(pattern("rotary.half"), two, None, "expected a concatenation, found mul", score=0.2)
    near = [
        NearMiss(pattern("rms_norm.gemma"), root, culprit, "expected 1 + weight, found weight", score=0.875)
        for root, culprit in ((two, one), (four, three))
    ]
    report = GraphReport.of(gm, [], [far, *near])
    assert lines_of(report)[1:] == [
        "",
        "Near misses: similar to a pattern, not replaced because they differ from it",
        "  rms_norm.gemma   2x   88% alike   model.layers.{0..1}.norm (LlamaRMSNorm)",
        "                                    modeling_llama.py:65  return self.weight * hidden_states",
        "      expected 1 + weight, found weight",
        "  rotary.half      1x   20% alike   model.layers.0.norm (LlamaRMSNorm)",
        "                                    modeling_llama.py:66  return self.weight * hidden_states",
        "      expected a concatenation, found mul",
    ]


def test_only_the_nearest_misses_are_printed():
    gm = layer_graph(layers=1)
    root = next(node for node in gm.graph.nodes if node.op == "call_function")
    misses = [
        NearMiss(pattern(f"op.{number}"), root, root, "it differs", number / 20) for number in range(15)
    ]
    report = GraphReport.of(gm, [], misses)
    assert "op.14" in str(report) and "op.2 " not in str(report)
    assert lines_of(report)[-1] == "  and 3 more, in to_dict()"
    assert len(report.to_dict()["near_misses"]) == 15


def test_notes_are_wrapped_and_nothing_found_is_one_line():
    gm = layer_graph(layers=1)
    assert str(GraphReport.of(gm, [])) == (
        "liger_compile  graph ?, 4 nodes: 0 replaced, 0 left alone, 0 near misses"
    )
    lines = lines_of(GraphReport.of(gm, [], notes=["graph output 3 may be logits of 64 classes " * 5]))
    assert lines[1:3] == ["", "Notes"]
    assert lines[3].startswith("  - graph output") and lines[4].startswith("    ")
    assert all(len(line) <= 110 for line in lines)


@pytest.mark.parametrize(
    ("paths", "folded"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0..2}.b"]),
        (["a.0", "a.2", "a.3", "a.7"], ["a.{0,2..3,7}"]),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1"], ["h.{0..1}.e.{0..1}"]),
        (["h.0.q", "h.0.k", "h.1.q", "norm"], ["h.{0..1}.q", "h.0.k", "norm"]),
        (["h.0"], ["h.0"]),
        ([""], [""]),
    ],
)
def test_folded_paths(paths: Sequence[str], folded: Sequence[str]):
    assert render.folded(paths) == folded


# Where things are.


def test_a_site_is_placed_in_the_deepest_module_that_most_of_it_ran_in():
    graph = fx.Graph()
    node = graph.placeholder("x")
    mlp = (("L['self']", LlamaForCausalLM), ("L['self'].h.0.mlp", LlamaMLP))
    nodes = []
    for path in ("gate", "up", None, None, "down"):
        node = graph.call_function(torch.mul, (node, node))
        inner = [(f"{mlp[-1][0]}.{path}", nn.Linear)] if path else []
        node.meta["nn_module_stack"] = stack(*mlp, *inner)
        nodes.append(node)
    graph.output(node)
    match = Match(pattern("gated_mlp.silu"), {}, (node,), tuple(nodes))
    (site,) = GraphReport.of(fx.GraphModule(nn.Module(), graph), [Decision(match, "replace")]).sites
    assert (site.place.module, site.place.module_class) == ("h.0.mlp", "LlamaMLP")


def test_places_and_shapes_of_a_real_dynamo_graph():
    seen = []

    def backend(gm: fx.GraphModule, example_inputs: list[object]):
        (rsqrt,) = (node for node in gm.graph.nodes if node.target is torch.rsqrt)
        match = Match(pattern("rms_norm.torch"), {}, (rsqrt,), (rsqrt,))
        seen.append(GraphReport.of(gm, [Decision(match, "replace")]))
        return gm.forward

    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))

    model = nn.Sequential(nn.Linear(4, 4), Norm())
    torch.compile(model, backend=backend, dynamic=True)(torch.ones(3, 4))
    (site,) = seen[0].sites
    assert site.place.module == "1" and site.place.module_class == "Norm"
    assert site.place.file == __file__ and site.place.code.startswith("return x * torch.rsqrt(")
    assert site.result == "f32[s77, 1]" or site.result.startswith("f32[s")
    assert seen[0].name == "0/0" or "/" in seen[0].name


def test_the_path_through_a_wrapper_that_has_a_getattr_of_its_own():
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = nn.Sequential(Norm())

        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_model(x)

    (site,) = explain(Wrapper(), torch.ones(3, 4)).graphs[0].sites
    assert site.place.module == "base_model.0" and site.place.module_class == "Norm"


def test_a_place_is_outside_of_pytorch():
    gm = layer_graph(layers=1)
    (match,) = matches(gm, "rms_norm.torch")
    inside = os.path.join(os.path.dirname(torch.__file__), "nn/modules/normalization.py")
    match.outputs[0].meta["stack_trace"] += (
        f'  File "{inside}", line 400, in forward\n    return F.rms_norm(\n'
    )
    (site,) = GraphReport.of(gm, [Decision(match, "replace")]).sites
    assert site.place.source == "modeling_llama.py:66"


def test_nodes_without_metadata_are_reported_without_a_place():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.neg, (x,))
    graph.output(y)
    match = Match(pattern("op.spelling"), {}, (y,), (y,))
    report = GraphReport.of(fx.GraphModule(nn.Module(), graph), [Decision(match, "leave", "no reason")])
    assert lines_of(report)[2:] == ["Left alone", "  op.spelling   1x      NoneType", "      no reason"]


def test_all_ops_of_a_replacement_are_named(run_liger):
    from liger_compile import functional

    def replace(x):
        return functional.rms_norm(functional.rms_norm(x, None, 1e-6), None, 1e-6) * functional.pre_norm(x)

    twice = Pattern(
        "twice.test",
        search=lambda x: torch.erf(torch.erf(x)),
        replace=replace,
        examples={"x": torch.empty(3, 16)},
    )
    _, (report,) = run_liger(lambda x: torch.erf(torch.erf(x)), torch.randn(2, 16), patterns=(twice,))
    (site,) = report.sites
    assert sorted(site.ops) == [
        "liger_compile::pre_norm",
        "liger_compile::pre_norm_statistics",
        "liger_compile::rms_norm",
    ]


# Programs.


def test_to_dict_survives_json():
    gm = layer_graph(layers=2)
    first, second = matches(gm, "rms_norm.llama")
    decisions = [Decision(first, "replace", saved_bytes=64), Decision(second, "leave", "why not")]
    near = NearMiss(pattern("rotary.half"), first.outputs[0], None, "it differs", 0.5)
    content = GraphReport.of(gm, decisions, [near], ["a note"], seconds=0.5).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["counts"] == {"replace": 1, "annotate": 0, "leave": 1}
    assert content["saved_bytes"] == 64
    assert content["sites"][1]["reason"] == "why not"
    assert content["sites"][0]["place"]["file"] == "/site/modeling_llama.py"
    assert content["near_misses"][0]["score"] == 0.5


def test_a_report_keeps_no_graph_alive():
    gm = layer_graph(layers=2)
    decisions = [Decision(match, "replace") for match in matches(gm, "rms_norm.llama")]
    node = decisions[0].match.outputs[0]
    alive = [weakref.ref(gm), weakref.ref(node.meta["example_value"])]
    report = GraphReport.of(gm, decisions, [NearMiss(pattern("a.b"), node, node, "it differs")])
    del gm, decisions, node
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert report.count("replace") == 2


# What it says is so.


class Layer(nn.Module):
    """A norm, a gated MLP and a GELU MLP, each read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.into, self.back = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        x = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.back(nn.functional.gelu(self.into(x)))


ROWS = 2 * 5
KEPT = {  # what eager keeps of it, if all is trained
    "rms_norm.llama": ROWS * 8 * 4,
    "gated_mlp.swiglu": ROWS * 12 * 4,
    "mlp.gelu": ROWS * 16 * 4,
}


def reported(model, *, inner: str = "aot_eager", x: torch.Tensor | None = None, **options) -> GraphReport:
    options = {f"liger.{name}": value for name, value in {"inner": inner, "strict": True, **options}.items()}
    torch.compile(model, backend="liger", options=options)(torch.randn(2, 5, 8) if x is None else x)
    (report,) = reports()
    assert report.to_dict()["saved_bytes"] == report.saved_bytes
    assert ("less kept for backward" in str(report)) == bool(report.saved_bytes)
    assert ("marked for recompute" in report.summary) == bool(report.count("annotate"))
    return report


def saved(report: GraphReport) -> dict[str, int | None]:
    return {site.pattern: site.saved_bytes for site in report.sites if site.kind != "leave"}


@pytest.mark.parametrize("inner", ["aot_eager", "report"])
def test_what_is_trained_saves_what_eager_would_keep(inner: str):
    assert saved(reported(Layer(), inner=inner)) == KEPT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_marked_and_nothing_saved(mode):
    with mode():
        report = reported(Layer())
    assert saved(report) == {}
    assert {site.pattern for site in report.sites} == {*KEPT}  # and no smaller pattern: Inductor does it well
    assert all(
        site.reason.endswith("no gradient is computed here, so nothing is kept") for site in report.sites
    )


def test_with_nothing_to_train_nothing_is_marked_and_nothing_saved():
    assert saved(reported(Layer().requires_grad_(False))) == {}


def test_a_loss_that_is_replaced_without_gradients_saves_nothing():
    head, labels = nn.Linear(8, 32), torch.zeros(10, dtype=torch.long)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(head(x).view(-1, 32), labels)

    with torch.no_grad():
        report = reported(loss, policy="always")
    assert (report.count("replace"), report.saved_bytes) == (1, 0)


def test_frozen_layers_keep_no_inputs_and_so_save_none():
    model = Layer().requires_grad_(False)
    model.norm.requires_grad_()  # before all the others: gradients come through them
    assert saved(reported(model)) == dict.fromkeys(KEPT, 0)


def test_one_layer_that_is_trained_keeps_its_input():
    model = Layer().requires_grad_(False)
    model.up.requires_grad_()
    model.back.weight.requires_grad_()
    model.down.bias.requires_grad_()  # for which nothing is kept
    x = torch.randn(2, 5, 8, requires_grad=True)
    assert saved(reported(model, x=x)) == {**KEPT, "gated_mlp.swiglu": 0}


def test_the_eager_compiler_takes_no_marks():
    report = reported(Layer(), inner="eager")
    assert saved(report) == {}
    assert all("liger.inner='eager' ignores marks" in site.reason for site in report.sites)


def test_marks_that_are_switched_off_save_nothing():
    report = reported(Layer(), recompute="off")
    assert report.saved_bytes == 0 and report.count("annotate") == 0


@pytest.mark.parametrize("policy", ["auto", "always"])
def test_inside_of_a_checkpoint_nothing_would_have_been_kept(policy: str):
    model, head = Layer(), nn.Linear(8, 8)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return head(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))

    assert reported(forward, policy=policy).saved_bytes == 0


def test_explain_reports_the_graph_for_inductor():
    (report,) = explain(Layer(), torch.randn(2, 5, 8)).graphs
    assert saved(report) == KEPT


def test_a_replacement_that_was_refused_counts_as_left_and_its_fuel_is_given_back():
    late = Pattern(
        "mine.late",
        lambda x: torch.erf(x).cos(),
        lambda x: x.double() if x.dim() == 3 else torch.erf(x).cos(),
        {"x": torch.empty(2)},
        saves=lambda match: 10**9,
    )
    x = torch.randn(2, 5, 8, requires_grad=True)
    report = reported(lambda x: Layer()(torch.erf(x).cos()), x=x, patterns=(late,), fuel=1, policy="always")
    counts = {kind: report.count(kind) for kind in ("replace", "annotate", "leave")}
    assert counts["replace"] + counts["annotate"] == 1
    assert report.to_dict()["counts"] == counts
    assert report.saved_bytes < 10**9
    (refused,) = (site for site in report.sites if site.pattern == "mine.late")
    assert (refused.kind, refused.saved_bytes) == ("leave", None)
    assert f"{counts['leave']} left alone" in report.summary


def test_nothing_is_reported_of_a_graph_that_was_not_compiled(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object):
        raise RuntimeError("the compiler fails")

    monkeypatch.setattr("liger_compile.compile.compile_graph", fail)
    with pytest.raises(Exception, match="the compiler fails"):
        torch.compile(Layer(), backend="liger")(torch.randn(2, 5, 8))
    assert reports() == ()


# The process-wide list and the logs.


def test_reports_are_listed_in_order_and_bounded():
    clear_reports()
    gm = layer_graph(layers=1)
    for number in range(300):
        record(GraphReport.of(gm, [], notes=[str(number)]))
    assert len(reports()) == 256
    assert reports()[0].notes == ("44",) and reports()[-1].notes == ("299",)
    clear_reports()
    assert reports() == ()


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        text=True,
        capture_output=True,
        timeout=300,
        check=True,
    )


COMPILE = """
import torch
def f(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
compiled = torch.compile(f, backend="liger", options={"liger.inner": "aot_eager"})
compiled(torch.ones(4, 8, requires_grad=True), torch.ones(8))
"""


# With TORCH_LOGS naming it, torch imports this package while it is itself being imported.
@pytest.mark.parametrize("first", ["", pytest.param("import liger_compile", marks=pytest.mark.slow)])
def test_torch_logs_with_a_plus_has_the_report_and_the_structured_trace_everything(
    first: str, tmp_path: Path
):
    log = run_python(first + COMPILE, TORCH_LOGS="+liger_compile", TORCH_TRACE=str(tmp_path)).stderr
    assert "liger_compile  graph 0/0" in log and "marked as cheap" in log and "rms_norm" in log
    (trace,) = tmp_path.iterdir()
    _, found, payload = trace.read_text().partition('"name": "liger_compile_report", "encoding": "json"')
    assert found and '"counts"' in payload


def test_without_a_plus_the_log_has_the_summary(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "liger_compile"):
        exec(COMPILE, {})
    text = "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.INFO)
    assert "liger_compile  graph 0/0" in text and "Replaced" not in text


# explain()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = x + torch.rand(8)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_explain_reports_one_call_and_puts_everything_back():
    model, random_state = Block(), torch.get_rng_state()
    explanation = explain(model, torch.ones(4, 8))
    assert len(explanation.graphs) == 1 and explanation.graph_breaks == ()
    assert "rms_norm" in str(explanation)
    assert model.calls == 0 and torch.equal(torch.get_rng_state(), random_state)
    again = explain(model, torch.ones(4, 8))
    assert [len(graph.sites) for graph in again.graphs] == [len(graph.sites) for graph in explanation.graphs]
    assert json.loads(json.dumps(again.to_dict())) == again.to_dict()


def test_explain_reports_graph_breaks():
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    explanation = explain(broken, torch.ones(2))
    assert len(explanation.graphs) == 2 and len(explanation.graph_breaks) == 1
    assert "Graph break: " in str(explanation)


def test_explain_of_a_function_without_tensors():
    assert "no graph" in str(explain(lambda: 1))
