"""flex_attention in a graph: which blocks a window sees, and numbers and gradients of attention that only it knows."""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
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


# Documents


def positions_of(*rows):
    """Positions that begin again: a row for each tuple of lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def rows_of(length):
    return positions_of((length // 3, length - length // 3), (1, 4, length - 5))


def same_document(ids):
    return (ids[:, None, :, None] == ids[:, None, None, :]).expand(BATCH, -1, -1, -1)


def by_positions(positions, window=None):
    """As transformers 5.24."""
    ids = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    seen = positions[:, None, :] <= positions[:, :, None]
    seen = seen if window is None else seen & (positions[:, None, :] > positions[:, :, None] - window)
    return seen[:, None] & same_document(ids)


def documents(q, k, v, positions):
    return F.scaled_dot_product_attention(q, k, v, by_positions(positions), enable_gqa=True)


def documents_window(q, k, v, positions):
    return F.scaled_dot_product_attention(q, k, v, by_positions(positions, 4), enable_gqa=True)


def documents_bidirectional(q, k, v, ids):
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), same_document(ids), scale=0.3)


def capped_documents(q, k, v, positions, window=None):
    scores = 3.0 * torch.tanh(q @ repeat_kv(k).mT * 2.0 / 3.0)
    seen = by_positions(positions, window)
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ repeat_kv(v)


def capped_documents_window(q, k, v, positions):
    return capped_documents(q, k, v, positions, 4)


DOCUMENTS = {
    function.__name__: function
    for function in (
        documents,
        documents_window,
        documents_bidirectional,
        capped_documents,
        capped_documents_window,
    )
}


# capped_documents_window has what these have.
SLOW = ("documents_window", "capped_documents")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in DOCUMENTS]
)
def test_documents_in_three_lengths_are_two_graphs(name):
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    function = DOCUMENTS[name]
    compiled = torch.compile(function, backend="liger", options=options)
    for length in (12, 150, 300):
        args = [x.requires_grad_() for x in inputs(length=length)]
        positions = rows_of(length)
        expected, result = function(*args, positions), compiled(*args, positions)
        torch.testing.assert_close(result, expected)
        upstream = torch.randn(result.shape)
        torch.testing.assert_close(
            torch.autograd.grad(result, args, upstream), torch.autograd.grad(expected, args, upstream)
        )
    reports = liger_compile.reports()
    assert [[site.pattern for site in report.sites] for report in reports] == 2 * [[f"attention.{name}"]]
    where = "within" if "bidirectional" in name else "causal within"
    given = "ids" if "bidirectional" in name else "positions"
    assert all(
        f"attention 1x {where} documents of {given}: flex_attention" in report.notes for report in reports
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("documents", torch.bfloat16), ("documents_window", torch.float16)]
)
def test_documents_in_half_precision(liger_is_as_right_as_eager, name, dtype):
    q, k, v = inputs(dtype, length=130)
    positions = rows_of(130)
    liger_is_as_right_as_eager(lambda q, k, v: DOCUMENTS[name](q, k, v, positions), q, k, v)


@pytest.mark.parametrize("name", ["documents", "documents_window", "documents_bidirectional"])
def test_variable_length_attention_has_the_numbers(name):
    """Of documents that are ranges of tokens, and of those that begin again: the reference of the op."""
    from liger_compile.patterns.attention import forcing_varlen

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    function = DOCUMENTS[name]
    compiled = torch.compile(function, backend="liger", options=options)
    for ids in (rows_of(20), torch.arange(20).remainder(3).expand(BATCH, -1).contiguous()):
        args = [x.requires_grad_() for x in inputs(length=20)]
        expected = function(*args, ids)
        with forcing_varlen(True):
            result = compiled(*args, ids)
        upstream = torch.randn(result.shape)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(
            torch.autograd.grad(result, args, upstream), torch.autograd.grad(expected, args, upstream)
        )
    (report,) = liger_compile.reports()
    ops = ("liger_compile::document_starts", "liger_compile::varlen_attention")
    assert report.sites[0].ops[:2] == ops  # the result that is returned is copied
    assert any(note.endswith(": variable-length attention") for note in report.notes)


def test_where_documents_start():
    from liger_compile.ops.varlen import document_starts

    ids = torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 3, 3]])
    starts, facts = document_starts(ids, 2)
    assert starts.tolist() == [0, 2, 5, *8 * [10]] and facts.tolist() == [3, 5, 1]
    starts, facts = document_starts(torch.tensor([[1, 0, 1]]), 2)
    assert starts.tolist() == [0, 1, 2, 3, 4, 5, 6] and facts.tolist() == [6, 1, 0]


@pytest.mark.parametrize("length", [1, 5, 127, 129, 256, 300])
@pytest.mark.parametrize(
    ("is_causal", "window"), [(True, None), (True, 2), (True, 129), (True, 300), (False, None)]
)
def test_blocks_of_documents_hold_what_is_visible(length, is_causal, window):
    """Partial blocks may hold nothing that is visible; a whole one holds nothing else."""
    from liger_compile.ops.flex import BLOCK_SIZE, document_block_mask

    generator = torch.Generator().manual_seed(length)
    recurring = torch.randint(0, 3, (2, length), generator=generator)
    for ids in (recurring, recurring.sort(-1).values, torch.zeros(1, length, dtype=torch.int64)):
        at = torch.arange(length)
        seen = ids[:, :, None] == ids[:, None, :]
        seen = seen & (at <= at[:, None]) if is_causal else seen
        seen = seen if window is None else seen & (at[:, None] - at < window)
        found = document_block_mask(ids, is_causal, window, lambda *args: None)
        blocks = -(-length // BLOCK_SIZE)
        padding = blocks * BLOCK_SIZE - length
        tiles = F.pad(seen, (0, padding, 0, padding)).unflatten(1, (blocks, -1)).unflatten(3, (blocks, -1))
        some, every = tiles.any(4).any(2), tiles.all(4).all(2)
        for prefix, is_transposed in (("kv", False), ("q", True)):
            partial = listed(getattr(found, f"{prefix}_num_blocks"), getattr(found, f"{prefix}_indices"))
            whole = listed(
                getattr(found, f"full_{prefix}_num_blocks"), getattr(found, f"full_{prefix}_indices")
            )
            wanted, complete = (x.mT if is_transposed else x for x in (some, every))
            assert not (partial & whole).any()
            assert (wanted <= (partial | whole)).all() and (whole <= complete).all()


def listed(numbers, indices):
    """The blocks that the lists of a block mask name, as booleans (B, blocks, blocks)."""
    assert numbers.dtype == indices.dtype == torch.int32
    assert indices.sort(-1).values.eq(torch.arange(indices.shape[-1])).all()  # valid also beyond the number
    is_listed = torch.arange(indices.shape[-1]) < numbers[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), is_listed)[:, 0]


def test_ids_that_are_written_later_are_those_of_before():
    def f(q, k, v, ids):
        ids = ids + 0
        mask = within(q, None) & same_document(ids)
        ids.zero_()
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), ids

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    args = (*inputs(), rows_of(12))
    torch.testing.assert_close(torch.compile(f, backend="liger", options=options)(*args), f(*args))


def checkpointed(q, k, v, positions, make_mask=by_positions):
    """Two layers, each a subgraph that receives the mask and not the ids."""
    mask = make_mask(positions)

    def layer(q, k, v, mask):
        return F.scaled_dot_product_attention(q * 1.5, k, v, mask, enable_gqa=True)

    for _ in range(2):
        q = torch.utils.checkpoint.checkpoint(layer, q, k, v, mask, use_reentrant=False)
    return q


def test_documents_of_checkpointed_layers(run_liger, liger_is_as_right_as_eager):
    positions = rows_of(150)
    args = [x.requires_grad_() for x in inputs(length=150)]
    liger_is_as_right_as_eager(lambda q, k, v: checkpointed(q, k, v, positions), *args)
    (report,) = liger_compile.reports()
    assert [site.pattern for site in report.sites] == 2 * ["attention.documents"]
    assert "attention 2x causal within documents of positions: flex_attention" in report.notes


def test_documents_that_a_checkpointed_layer_does_not_have_are_left_with_a_reason(run_liger):
    """The ids are written after the mask was made."""

    def mask_of(positions):
        ids = (positions == 0).cumsum(-1)
        mask = within(positions[:, None], None).new_ones(()) & same_document(ids)
        ids.zero_()
        return mask

    args = [x.requires_grad_() for x in inputs()]
    result, (report,) = run_liger(lambda *args: checkpointed(*args, mask_of), *args, rows_of(12))
    assert not report.sites
    assert any("the ids of its documents are not in this graph" in note for note in report.notes)
    torch.testing.assert_close(result, checkpointed(*args, rows_of(12), mask_of))


def test_documents_with_dropout_keep_their_mask(run_liger):
    def f(q, k, v, positions):
        return F.scaled_dot_product_attention(q, k, v, by_positions(positions), 0.1, enable_gqa=True)

    _, (report,) = run_liger(f, *inputs(), rows_of(12))
    assert not report.sites
    assert any("within documents, which is supported without dropout only" in note for note in report.notes)
