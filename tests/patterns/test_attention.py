"""Attention whose mask is made of positions, and heads that share keys."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import liger_compile
from liger_compile.patterns import attention

BATCH, HEADS, GROUPS, LENGTH, SIZE = 2, 4, 2, 12, 16


def heads(count, length=LENGTH, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, count, SIZE, generator=generator).to(dtype).transpose(1, 2)


def inputs(groups=GROUPS, dtype=torch.float32, length=LENGTH):
    return tuple(heads(n, length, dtype, seed) for seed, n in enumerate((HEADS, groups, groups)))


def causal_mask(q):
    i = torch.arange(q.shape[-2], device=q.device)
    return (i[None, :] <= i[:, None]).expand(q.shape[0], 1, -1, -1)


def repeat_kv(x):
    batch, groups, length, size = x.shape
    expanded = x[:, :, None].expand(batch, groups, HEADS // groups, length, size)
    return expanded.reshape(batch, HEADS, length, size)


def hugging_face(q, k, v):
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), causal_mask(q), 0.0, scale=0.3)


def interleaved(q, k, v):
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q))


def torchtitan(q, k, v):
    """Repeats before the heads go in front of the tokens."""

    def repeated(x):
        x = x.transpose(1, 2)
        batch, length, groups, size = x.shape
        x = x[:, :, :, None, :].expand(batch, length, groups, HEADS // groups, size)
        return x.reshape(batch, length, HEADS, size).transpose(1, 2)

    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=causal_mask(q))


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, causal_mask(q), enable_gqa=True)


def additive(q, k, v):
    mask = torch.full((q.shape[-2], q.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)


SPELLINGS = {f.__name__: f for f in (hugging_face, interleaved, torchtitan, grouped, additive)}


def attention_nodes(run_liger, monkeypatch, function, *args, **options):
    """What is left of a function: the graph's names, and the keywords of its one attention."""
    from liger_compile import backend

    graphs = []
    compile_graph = backend.compiling.compile_graph

    def keeping(gm, *args, **kwargs):
        graphs.append(gm)
        return compile_graph(gm, *args, **kwargs)

    monkeypatch.setattr(backend.compiling, "compile_graph", keeping)
    run_liger(function, *args, **options)
    (gm,) = graphs
    (attention,) = [n for n in gm.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    return [n.name for n in gm.graph.nodes if n.op.startswith("call")], attention.kwargs


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_one_site_with_the_numbers(liger_is_as_right_as_eager, name, dtype):
    liger_is_as_right_as_eager(SPELLINGS[name], *inputs(dtype=dtype))
    (report,) = liger_compile.reports()
    (site,) = report.sites
    assert (site.kind, site.pattern) == ("replace", "attention.causal")


@pytest.mark.parametrize("name", SPELLINGS)
def test_neither_mask_nor_repeats_are_left(run_liger, monkeypatch, name):
    names, keywords = attention_nodes(run_liger, monkeypatch, SPELLINGS[name], *inputs())
    wanted = {"dropout_p": 0.0, "is_causal": True, "enable_gqa": True}
    assert keywords == {**wanted, "scale": 0.3 if name == "hugging_face" else None}
    assert not [n for n in names if n.startswith(("arange", "le", "triu", "repeat", "expand"))]


def test_as_many_heads_of_keys_as_of_queries(run_liger, monkeypatch, liger_is_as_right_as_eager):
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, causal_mask(q), dropout_p=0.0)

    _, keywords = attention_nodes(run_liger, monkeypatch, f, *inputs(HEADS))
    assert keywords["is_causal"] and not keywords["enable_gqa"]
    torch._dynamo.reset()
    liger_compile.clear_reports()
    liger_is_as_right_as_eager(f, *inputs(HEADS))


def test_repeats_stay_where_the_kernel_does_not_take_groups(
    run_liger, monkeypatch, liger_is_as_right_as_eager
):
    from liger_compile.patterns import attention

    # Private: the answer of a kernel that is not here.
    monkeypatch.setattr(attention, "_takes_groups", lambda q, v: False)
    names, keywords = attention_nodes(run_liger, monkeypatch, hugging_face, *inputs())
    assert keywords["is_causal"] and not keywords["enable_gqa"]
    assert [n for n in names if n.startswith("expand")] and "le" not in names
    torch._dynamo.reset()
    liger_compile.clear_reports()
    liger_is_as_right_as_eager(hugging_face, *inputs())


def test_a_mask_that_hides_nothing(run_liger, monkeypatch, liger_is_as_right_as_eager):
    def f(q, k, v):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)

    args = (heads(HEADS), heads(GROUPS, 7), heads(GROUPS, 7, seed=3))
    _, keywords = attention_nodes(run_liger, monkeypatch, f, *args)
    assert not keywords["is_causal"] and "attn_mask" not in keywords
    torch._dynamo.reset()
    liger_compile.clear_reports()
    liger_is_as_right_as_eager(f, *args)


def test_three_lengths_are_one_graph():
    def f(q, k, v):
        batch, length = q.shape[:2]
        q, k, v = (x.view(batch, length, -1, SIZE).transpose(1, 2) for x in (q, k, v))
        return hugging_face(q, k, v)

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(f, backend="liger", options=options)
    for length in (5, 12, 31):
        args = [x.transpose(1, 2).flatten(2).requires_grad_() for x in inputs(length=length)]
        for x in args:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)  # raises if a guard makes it static
        expected, result = f(*args), compiled(*args)
        torch.testing.assert_close(result, expected)
        upstream = torch.randn(result.shape)
        torch.testing.assert_close(
            torch.autograd.grad(result, args, upstream), torch.autograd.grad(expected, args, upstream)
        )
    (report,) = liger_compile.reports()
    assert [site.kind for site in report.sites] == ["replace"]


def test_two_layers_share_a_mask(run_liger):
    def f(q, k, v):
        mask = causal_mask(q)
        first = F.scaled_dot_product_attention(q, k, v, mask)
        with torch.no_grad():
            table = torch.arange(q.shape[-2])[:, None].cos()
        return F.scaled_dot_product_attention(first * table, k, v, mask)

    args = inputs(HEADS)
    result, (report,) = run_liger(f, *args)
    assert [site.kind for site in report.sites] == ["replace", "replace"]
    torch.testing.assert_close(result, f(*args))


def test_a_mask_that_is_returned_too_stays(run_liger):
    def f(q, k, v):
        mask = causal_mask(q)
        return F.scaled_dot_product_attention(q, k, v, mask), mask

    args = inputs(HEADS)
    result, (report,) = run_liger(f, *args)
    assert [site.kind for site in report.sites] == ["replace"]
    torch.testing.assert_close(result, f(*args))


def test_dropout_is_kept(run_liger, monkeypatch):
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, causal_mask(q), dropout_p=0.25)

    _, keywords = attention_nodes(run_liger, monkeypatch, f, *inputs(HEADS))
    assert keywords["dropout_p"] == 0.25 and keywords["is_causal"]


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_a_scale_that_is_not_positive_keeps_the_mask(run_liger, scale):
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, causal_mask(q), scale=scale)

    args = inputs(HEADS)
    result, (report,) = run_liger(f, *args)
    (site,) = report.sites
    assert site.kind == "leave" and f"its scale is {scale}" in site.reason
    torch.testing.assert_close(result, f(*args))


def test_autocast(run_liger):
    def f(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return hugging_face(q, k, v)

    args = inputs()
    result, (report,) = run_liger(f, *args)
    assert [site.kind for site in report.sites] == ["replace"]
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, f(*args), atol=0.02, rtol=0.02)


def test_auto_takes_it_on_a_cpu(run_liger):
    _, (report,) = run_liger(hugging_face, *inputs(), policy="auto")
    assert [site.kind for site in report.sites] == ["replace"]


def off_by_one(q, k, v):
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def by_an_input(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, causal_mask(q) & (q[:, 0, :, 0] > -9)[:, None, :, None])


def written_over(q, k, v):
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    mask[0, 1] = True
    return F.scaled_dot_product_attention(q, k, v, mask)


def later_keys(q, k, v):
    i = torch.arange(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, (i[None, :] + 1 <= i[:, None] + 1) & (i[None, :] != 3))


@pytest.mark.parametrize("function", [off_by_one, by_an_input, written_over, later_keys])
@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
def test_other_masks_are_kept_with_a_reason(function, is_dynamic):
    args = inputs(HEADS)
    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    for x in args if is_dynamic else ():
        torch._dynamo.mark_dynamic(x, 2)
    compiled = torch.compile(function, backend="liger", options=options)
    torch.testing.assert_close(compiled(*args), function(*args))
    (report,) = liger_compile.reports()
    assert not report.sites
    (note,) = report.notes
    assert note.startswith("attention keeps its mask 1x: it ")


def test_one_query_of_many_keys(run_liger):
    """As in generation: query 0 sees all keys, and a flag would show it the first alone."""

    def f(q, k, v):
        j = torch.arange(k.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, j[None, :] <= j[-1:, None])

    args = (heads(HEADS, 1), heads(HEADS), heads(HEADS, seed=3))
    result, (report,) = run_liger(f, *args)
    assert all(site.pattern == "attention.unmasked" for site in report.sites)
    torch.testing.assert_close(result, f(*args))


def test_attention_with_the_causal_flag_is_no_site(run_liger):
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(
            k, q, v
        )

    _, (report,) = run_liger(f, *inputs(HEADS))
    assert not report.sites and not report.notes and not report.near_misses


def test_heads_in_another_order_are_not_groups(run_liger, monkeypatch):
    """Keys tiled, so that head h has keys h % G."""

    def tiled(x):
        batch, groups, length, size = x.shape
        return x[:, None].expand(batch, 2, groups, length, size).reshape(batch, HEADS, length, size)

    def f(q, k, v):
        return F.scaled_dot_product_attention(q, tiled(k), tiled(v), causal_mask(q))

    args = inputs()
    _, keywords = attention_nodes(run_liger, monkeypatch, f, *args)
    assert keywords["is_causal"] and not keywords["enable_gqa"]
    torch._dynamo.reset()
    result, _ = run_liger(f, *args)
    torch.testing.assert_close(result, f(*args))


def test_keys_repeated_and_values_not(run_liger):
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, repeat_kv(k), v, causal_mask(q))

    args = (heads(HEADS), heads(GROUPS), heads(HEADS, seed=3))
    result, (report,) = run_liger(f, *args)
    assert [site.kind for site in report.sites] == ["replace"]
    torch.testing.assert_close(result, f(*args))


def one_head(q, k, v):
    """Keys of one head, which torch broadcasts: Falcon's multi-query attention."""
    return F.scaled_dot_product_attention(q, k, v, causal_mask(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_one_head_that_are_broadcast(run_liger, liger_is_as_right_as_eager, dtype):
    args = inputs(groups=1, dtype=dtype)
    result, (report,) = run_liger(one_head, *args)
    assert [(site.pattern, site.kind) for site in report.sites] == [("attention.causal", "replace")]
    assert result.shape == one_head(*args).shape
    torch._dynamo.reset()
    liger_is_as_right_as_eager(one_head, *args)


def test_keys_that_are_broadcast_over_the_batch_are_left(run_liger):
    q, k, v = inputs(groups=1)
    result, (report,) = run_liger(one_head, q, k[:1], v[:1])
    assert not [site for site in report.sites if site.kind == "replace"]
    torch.testing.assert_close(result, one_head(q, k[:1], v[:1]))


class OnGpu(dict):
    """What the profit rule of packed rows reads of a match on a GPU."""

    captures, nodes = property(dict.keys), (SimpleNamespace(target=F.scaled_dot_product_attention),)

    def __init__(self, name, q, **captures):
        super().__init__(q=q, documents=torch.zeros(2, q.shape[-2]), **captures)
        (self.pattern,) = (pattern for pattern in attention.PATTERNS if pattern.name == f"attention.{name}")


@pytest.mark.parametrize(
    ("name", "dtype", "tokens", "reason"),
    [
        ("documents", torch.bfloat16, 2048, None),
        ("documents_window", torch.float16, 1024, None),
        ("documents", torch.bfloat16, 1023, "for fewer than 1024 tokens"),
        ("documents", torch.float32, 2048, "not measured"),
        ("documents_bidirectional", torch.bfloat16, 2048, "not measured"),
        ("capped_documents", torch.bfloat16, 4096, "not measured"),
    ],
)
def test_packed_rows_are_replaced_by_default_where_that_was_measured(name, dtype, tokens, reason):
    with FakeTensorMode():
        q = torch.empty(2, 4, tokens, 64, dtype=dtype, device="cuda")
        match = OnGpu(name, q, **({"softcap": 3.0} if "capped" in name else {}))
        found = match.pattern.profit(match)
    assert found == reason or reason in found
