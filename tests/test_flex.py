"""flex_attention in a graph: which blocks a window sees, and numbers and gradients of attention that only it knows."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx import Graph
from torch.nn.attention.flex_attention import create_block_mask

import liger_compile
from liger_compile.ops.flex import block_mask
from liger_compile.pattern import Capture, Match
from liger_compile.registry import default_patterns

BATCH, HEADS, GROUPS, SIZE = 2, 4, 2, 16
LENGTHS = (1, 5, 127, 128, 129, 255, 256, 257, 300, 512, 1000)
WINDOWS = (None, 1, 2, 50, 127, 128, 129, 130, 255, 256, 257, 258, 300, 384, 385, 900, 5000)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_are_those_of_create_block_mask(length):
    for window in WINDOWS:

        def mask(batch, head, query, key, window=window):
            return key <= query if window is None else (key <= query) & (query - key < window)

        wanted = create_block_mask(mask, None, None, length, length, device="cpu")
        found = block_mask(torch.empty(1, 1, length, SIZE), window, mask)
        for count, which in (
            ("kv_num_blocks", "kv_indices"),
            ("full_kv_num_blocks", "full_kv_indices"),
            ("q_num_blocks", "q_indices"),
            ("full_q_num_blocks", "full_q_indices"),
        ):
            numbers, indices = getattr(found, count), getattr(found, which)
            assert numbers.dtype == indices.dtype == torch.int32
            assert torch.equal(numbers, getattr(wanted, count)), (window, count)
            assert indices.shape == getattr(wanted, which).shape
            assert indices.min() >= 0 and indices.max() < indices.shape[-1]  # also what is beyond the number
            for row, number in enumerate(numbers[0, 0]):
                expected = getattr(wanted, which)[0, 0, row, :number]
                assert torch.equal(indices[0, 0, row, :number], expected), (window, which, row)


def inputs(dtype=torch.float32, length=12, groups=GROUPS):
    def heads(count, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(BATCH, length, count, SIZE, generator=generator).to(dtype).transpose(1, 2)

    return tuple(heads(n, seed) for seed, n in enumerate((HEADS, groups, groups)))


def repeat_kv(x):
    batch, groups, length, size = x.shape
    return (
        x[:, :, None].expand(batch, groups, HEADS // groups, length, size).reshape(batch, HEADS, length, size)
    )


def within(q, window):
    i = torch.arange(q.shape[-2], device=q.device)
    seen = i[None, :] <= i[:, None]
    return seen if window is None else seen & (i[None, :] > i[:, None] - window)


def mistral(q, k, v, window=4):
    mask = within(q, window).expand(q.shape[0], 1, -1, -1)
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask, 0.0, scale=0.3)


def without_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, within(q, 5), enable_gqa=True)


def written_out(q, k, v):
    scores = q @ repeat_kv(k).mT * 0.25
    return scores.masked_fill(~within(q, 3), -math.inf).softmax(-1) @ repeat_kv(v)


def gemma(q, k, v, window=None):
    """The scores are large, so that the cap bends them."""
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * 2.0
    scores = torch.tanh(scores / 3.0) * 3.0
    # float16's lowest number is not so low that nothing could reach it, so that attention with it is left alone.
    lowest = -math.inf if q.dtype == torch.float16 else torch.finfo(q.dtype).min
    scores = scores + torch.where(within(q, window), torch.zeros((), dtype=q.dtype), lowest)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v)).transpose(1, 2).contiguous()


def gemma_window(q, k, v):
    return gemma(q, k, v, 4)


CASES = {
    "window": mistral,
    "window, without a scale": without_scale,
    "window, written out": written_out,
    "capped_causal": gemma,
    "capped_window": gemma_window,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_site_with_the_numbers(run_liger, liger_is_as_right_as_eager, name, dtype):
    function, args = CASES[name], inputs(dtype)
    liger_is_as_right_as_eager(function, *args)
    (report,) = liger_compile.reports()
    (site,) = report.sites
    assert (site.kind, site.pattern) == ("replace", f"attention.{name.partition(',')[0]}")
    # gemma's result is made contiguous after the op. The others return what flex_attention saves for backward.
    assert bool(report.notes) == ("capped" not in name)
    assert all("1 result of a fused op is copied" in note for note in report.notes)


@pytest.mark.parametrize("name", CASES)
def test_more_than_one_block_and_not_a_whole_number_of_them(liger_is_as_right_as_eager, name):
    liger_is_as_right_as_eager(CASES[name], *inputs(length=150))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["window", "capped_causal", "capped_window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
def test_numbers_of_inductors_kernels(liger_is_as_right_as_eager, name, dtype, size):
    """With the tiles that ops/flex.py gives them, and lengths that no tile divides."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, 1100, n, size, device="cuda") for n in (HEADS, GROUPS, GROUPS))
    heads = [x.to(dtype).transpose(1, 2) for x in (q * size**-0.5, k, v)]
    function = {"window": lambda q, k, v: mistral(q, k, v, 300), "capped_causal": gemma}.get(
        name, lambda q, k, v: gemma(q, k, v, 300)
    )
    liger_is_as_right_as_eager(function, *heads, inner="inductor")


def test_the_mask_is_gone(monkeypatch):
    """Two functions and eight small tensors of integers are left of it."""
    from liger_compile import backend

    graphs = []
    compile_graph = backend.compiling.compile_graph

    def keeping(gm, *args, **kwargs):
        graphs.append(gm)
        return compile_graph(gm, *args, **kwargs)

    monkeypatch.setattr(backend.compiling, "compile_graph", keeping)
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    torch.compile(gemma_window, backend="liger", options=options)(*inputs(length=300))
    (gm,) = graphs
    assert len([n for n in gm.graph.nodes if n.op == "get_attr"]) == 2
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            assert value.shape[-2:] != (300, 300)


def test_a_head_dimension_of_keys_that_is_not_of_values(liger_is_as_right_as_eager):
    q, k, v = inputs(groups=HEADS)
    liger_is_as_right_as_eager(lambda q, k, v: mistral(q, k, v[..., :8]), q, k, v)


@pytest.mark.parametrize("function", [mistral, gemma_window])
def test_three_lengths_are_one_graph(function):
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(function, backend="liger", options=options)
    for length in (140, 150, 300):
        args = inputs(length=length)
        for x in args:
            torch._dynamo.mark_dynamic(x, 2)  # raises if a guard makes it static
            x.requires_grad_()
        expected, result = function(*args), compiled(*args)
        torch.testing.assert_close(result, expected)
        upstream = torch.randn(result.shape)
        torch.testing.assert_close(
            torch.autograd.grad(result, args, upstream), torch.autograd.grad(expected, args, upstream)
        )
    (report,) = liger_compile.reports()
    assert [site.kind for site in report.sites] == ["replace"]


def test_a_window_no_smaller_than_the_sequence_is_causal(run_liger):
    for window, pattern in ((11, "attention.window"), (12, "attention.causal"), (4096, "attention.causal")):
        torch._dynamo.reset()
        result, (report,) = run_liger(lambda q, k, v, w=window: mistral(q, k, v, w), *inputs())
        assert [site.pattern for site in report.sites] == [pattern]
        torch.testing.assert_close(result, mistral(*inputs(), window))


@pytest.mark.parametrize(("most", "pattern"), [(16, "causal"), (17, "window")])
def test_a_window_no_smaller_than_any_sequence_is_causal(most, pattern):
    options = {"liger.inner": "eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(mistral, backend="liger", options=options)
    for length in (12, 16):
        args = inputs(length=length)
        for x in args:
            torch._dynamo.mark_dynamic(x, 2, min=2, max=most)
        torch.testing.assert_close(compiled(*args, window=16), mistral(*args, window=16))
    (report,) = liger_compile.reports()
    assert [site.pattern for site in report.sites] == [f"attention.{pattern}"]


def test_nowhere_but_on_a_gpu(run_liger):
    """Where Inductor has no backward for it."""
    _, (report,) = run_liger(mistral, *inputs(), policy="auto")
    (site,) = report.sites
    assert site.kind == "leave" and site.reason.endswith("has a backward on NVIDIA GPUs only")
    torch._dynamo.reset()
    result, (report,) = run_liger(mistral, *inputs(), inner="inductor")  # nor if it is wanted always
    (site,) = report.sites
    assert site.kind == "leave" and site.reason.startswith(
        "the replacement refuses: Inductor has a backward of flex_attention on NVIDIA"
    )
    torch.testing.assert_close(result, mistral(*inputs()))


@pytest.mark.parametrize(
    ("name", "dtype", "fewest"),
    [
        ("window", torch.bfloat16, 256),
        ("window", torch.float32, 1024),
        ("capped_causal", torch.float16, 2048),
        ("capped_window", torch.float32, 2048),
    ],
)
def test_short_sequences_are_left_to_inductor_on_a_gpu(name, dtype, fewest):
    (pattern,) = (each for each in default_patterns() if each.name == f"attention.{name}")
    for length, pays in ((fewest, True), (fewest - 1, False)):
        with FakeTensorMode():
            q = torch.empty(1, 2, length, 64, device="cuda", dtype=dtype)
        node = Graph().placeholder("q")
        captures = {
            name: Capture(node, value=q) if isinstance(value, torch.Tensor) else value
            for name, value in pattern.examples.items()
        }
        reason = pattern.profit(Match(pattern, captures, (node,), (node,)))
        assert reason is None if pays else f"fewer than {fewest} tokens" in reason


def test_a_refusal_leaves_no_functions_behind(run_liger, monkeypatch):
    from liger_compile.steps import rewrite

    graphs = []
    # Private: a refusal that no valid pattern provokes, and the end of what it cleans up.
    monkeypatch.setattr(rewrite, "_difference", lambda *args: "it is another")
    monkeypatch.setattr(rewrite, "_erase_unused", lambda graph, match: graphs.append(graph))
    kept = rewrite.rewrite

    def keeping(graph, *args, **kwargs):
        graphs.append(graph)
        return kept(graph, *args, **kwargs)

    monkeypatch.setattr("liger_compile.pipeline.rewrite", keeping)
    _, (report,) = run_liger(gemma_window, *inputs())
    assert [site.reason for site in report.sites] == ["it is another"]
    (graph,) = graphs
    assert not [name for name in vars(graph.owning_module)["_modules"] if name.startswith("liger_")]


def test_what_has_no_cap_is_not_capped(run_liger):
    def f(q, k, v):
        return mistral(q, k, v, None), written_out(q, k, v)

    _, (report,) = run_liger(f, *inputs(), skip=("attention.causal", "attention.window"))
    assert not report.sites


def test_a_window_that_hides_everything_is_left(run_liger):
    def f(q, k, v):
        return mistral(q, k, v, 0)

    _, (report,) = run_liger(f, *inputs())
    assert not [site for site in report.sites if site.kind == "replace"]


def dropped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, within(q, 4), 0.1)


def capped_without_mask(q, k, v):
    return (torch.tanh(q @ k.mT) * 3.0).softmax(-1) @ v


def capped_twice(q, k, v):
    return (torch.tanh(torch.tanh(q @ k.mT)) + within(q, None).log()).softmax(-1) @ v


def capped_after_the_mask(q, k, v):
    return torch.tanh((q @ k.mT).masked_fill(~within(q, None), -math.inf)).softmax(-1) @ v


LEFT = {
    dropped: "keeps its mask 1x: it is causal within a window of 4",
    capped_without_mask: "stays written out for its mask 1x: its scores are capped",
    capped_twice: "stays written out 1x: the operand of its softmax",
    capped_after_the_mask: "stays written out 1x: the operand of its softmax",
}


@pytest.mark.parametrize("function", LEFT)
def test_attention_that_is_left_has_a_reason(run_liger, function):
    torch.manual_seed(0)
    result, (report,) = run_liger(function, *inputs(groups=HEADS))
    assert not report.sites
    (note,) = report.notes
    assert note.startswith(f"attention {LEFT[function]}")
    torch.manual_seed(0)
    torch.testing.assert_close(result, function(*inputs(groups=HEADS)))
