"""The backend as a user meets it: by name, with options, when something fails, and in nested graphs."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile.pattern import Pattern


class Norm(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * x32.to(x.dtype)


class Block(torch.nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.norm = Norm(size)
        self.gate, self.up = torch.nn.Linear(size, 12, bias=False), torch.nn.Linear(size, 12, bias=False)
        self.down = torch.nn.Linear(12, size)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rewritten(reports):
    return sorted(site.pattern for report in reports for site in report.sites if site.kind != "leave")


def replaced(reports):
    return sorted(site.pattern for report in reports for site in report.sites if site.kind == "replace")


@pytest.mark.slow  # test_packaging.py has the name alone, of an installed wheel
def test_the_name_is_enough():
    code = (
        "import torch\n"
        "f = torch.compile(lambda x: torch.nn.functional.silu(x) * x, backend='liger',\n"
        "                  options={'liger.inner': 'eager', 'liger.strict': True})\n"
        "f(torch.ones(2, 2))\n"
        "import liger_compile; print(len(liger_compile.reports()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "1", run.stderr
    assert "graph 0/0" not in run.stderr  # without TORCH_LOGS; see tests/test_report.py


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_module_gives_the_numbers_of_eager(run_liger, inner):
    block, x = Block(), torch.randn(3, 5, 8, requires_grad=True)
    expected = block(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    result, reports = run_liger(block, x, inner=inner)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])
    mlp = [] if inner == "eager" else ["gated_mlp.swiglu"]  # which is marked, and eager takes no marks
    assert rewritten(reports) == [*mlp, "rms_norm.llama"]


def test_sites_say_where_they_stand(run_liger):
    _, (report,) = run_liger(Block(), torch.randn(3, 5, 8))
    places = {site.pattern: site.place for site in report.sites}
    assert places["rms_norm.llama"].module.endswith("norm")
    assert places["rms_norm.llama"].source.startswith("test_backend.py:")


def test_inductor_is_what_compiles_by_default():
    block, x = Block(), torch.randn(3, 5, 8)
    compiled = torch.compile(block, backend="liger", options={"liger.strict": True})
    torch.testing.assert_close(compiled(x), block(x))


@pytest.fixture
def failing(monkeypatch):
    """A rewriter that fails after it has edited the graph."""
    from liger_compile import pipeline

    def rewrite_and_fail(graph, *args, **kwargs):
        for node in list(graph.nodes):
            if node.op == "call_function":
                node.replace_all_uses_with(next(iter(graph.nodes)))
                graph.erase_node(node)
        raise KeyError("a bug of ours")

    monkeypatch.setattr(pipeline, "rewrite", rewrite_and_fail)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_failure_of_ours_warns_once_and_compiles_the_untouched_graph(failing, inner):
    block, x = Block(), torch.randn(3, 5, 8)
    compiled = torch.compile(block, backend="liger", options={"liger.inner": inner})
    with pytest.warns(UserWarning, match=r"the rewriter failed: KeyError: 'a bug of ours'") as caught:
        torch.testing.assert_close(compiled(x), block(x))
    assert len([w for w in caught if "liger_compile" in str(w.message)]) == 1
    (report,) = liger_compile.reports()
    assert not report.sites and "the rewriter failed" in str(report)


def test_strict_raises_instead(failing):
    compiled = torch.compile(Block(), backend="liger", options={"liger.inner": "eager", "liger.strict": True})
    with pytest.raises(Exception, match="a bug of ours"):
        compiled(torch.randn(3, 5, 8))


def test_no_warning_where_nothing_fails(run_liger):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # torch's own
        run_liger(Block(), torch.randn(3, 5, 8), strict=False)


def test_a_replacement_of_another_result_is_refused(run_liger):
    """examples cannot show everything: here replace differs for a shape that they do not have."""
    pattern = Pattern(
        name="flattened.test",
        search=lambda input: torch.erf(input),
        replace=lambda input: torch.erf(input) if input.dim() < 2 else torch.erf(input).float(),
        examples={"input": torch.empty(3)},
    )
    x = torch.randn(2, 3).bfloat16()
    result, (report,) = run_liger(lambda x: torch.erf(x) + 1, x, patterns=(pattern,))
    (site,) = report.sites
    assert site.reason == "the replacement's result has dtype torch.float32, the original's torch.bfloat16"
    torch.testing.assert_close(result, torch.erf(x) + 1)


def test_a_replacement_keeps_the_strides_of_the_original(run_liger):
    pattern = Pattern(
        name="contiguous.test",
        search=lambda input: torch.erf(input),
        replace=lambda input: torch.erf(input.contiguous()),
        examples={"input": torch.empty(3, 5)},
    )
    x = torch.randn(2, 3, 4).transpose(0, 2)

    def f(x):
        return torch.erf(x).transpose(0, 2).view(-1)  # view() needs the strides of the original

    result, reports = run_liger(f, x, patterns=(pattern,))
    assert replaced(reports) == ["contiguous.test"]
    torch.testing.assert_close(result, f(x))


def test_dynamic_shapes_are_one_graph_for_all_lengths():
    block = Block()
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(block, backend="liger", dynamic=True, options=options)
    for length in (5, 7, 11):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(compiled(x), block(x))
    assert [rewritten([report]) for report in liger_compile.reports()] == [
        ["gated_mlp.swiglu", "rms_norm.llama"]
    ]


def test_fullgraph_and_no_grad(run_liger):
    block, x = Block(), torch.randn(3, 5, 8)
    compiled = torch.compile(
        block, backend="liger", fullgraph=True, options={"liger.inner": "aot_eager", "liger.strict": True}
    )
    with torch.no_grad():
        result = compiled(x)
    assert not result.requires_grad
    torch.testing.assert_close(result, block(x))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_seen(run_liger, inside):
    block, x = Block(), torch.randn(3, 5, 8)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return block(x)

    with torch.autocast("cpu", torch.bfloat16):
        result, reports = run_liger(step, x, inner="aot_eager")
        expected = step(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    assert "rms_norm.llama" in replaced(reports)


def test_an_unknown_option_is_a_sentence_with_the_known_ones():
    compiled = torch.compile(Block(), backend="liger", options={"liger.polcy": "never"})
    with pytest.raises(Exception, match=r"unknown option 'liger.polcy'; did you mean 'liger.policy'"):
        compiled(torch.randn(3, 5, 8))


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("rms_norm.lama", "no pattern and no pass; did you mean 'rms_norm.llama'?"),
        ("backward.qkv_matmuls", "did you mean 'backward.qkv_matmul'?"),
        ("nothing of the kind", "is no pattern and no pass"),
        ("rms_norm", None),
        ("backward", None),
        ("backward.early_free", None),
    ],
)
def test_a_name_to_skip_that_there_is_not_is_in_the_report(run_liger, name, note):
    block, x = Block(), torch.randn(3, 5, 8)
    _, (report,) = run_liger(block, x, skip=(name,))
    found = [each for each in report.notes if "liger.skip" in each]
    assert [note in each for each in found] == ([True] if note else [])


def test_logits_of_a_loss_elsewhere_are_noted(run_liger):
    head = torch.nn.Linear(8, 64, bias=False)
    _, (report,) = run_liger(lambda x: head(torch.tanh(x)).float(), torch.randn(3, 8))
    assert len(report.notes) == 1 and "may be logits of 64 classes" in report.notes[0]
    torch._dynamo.reset()
    _, (report,) = run_liger(
        lambda x, y: F.cross_entropy(head(torch.tanh(x)), y), torch.randn(3, 8), torch.tensor([1, 2, 3])
    )
    assert not report.notes


def test_a_head_is_recognized_by_the_vocabulary_that_the_graph_embeds(run_liger):
    table, head, up = torch.nn.Embedding(24, 16), torch.nn.Linear(16, 24), torch.nn.Linear(16, 160)
    ids = torch.tensor([1, 2, 3])
    _, (report,) = run_liger(lambda ids: head(table(ids).tanh()), ids)  # not much wider than the model
    assert len(report.notes) == 1 and "may be logits of 24 classes" in report.notes[0]
    torch._dynamo.reset()
    _, (report,) = run_liger(lambda ids: up(table(ids).tanh()), ids)  # much wider, and no tokens
    assert not report.notes


def test_near_misses_name_the_step(run_liger):
    def rounds_the_inverse(x, w):  # as Inkling does: the inverse is rounded before the product
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        return w * (x * inverse)

    _, (report,) = run_liger(rounds_the_inverse, torch.randn(4, 8).bfloat16(), torch.rand(8).bfloat16())
    assert not report.sites
    (near,) = report.near_misses
    assert near.pattern.startswith("rms_norm.") and "rounds elsewhere" in near.reason
