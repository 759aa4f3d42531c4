"""Attention written out in full: one term in every spelling, and one sentence where it has to stay."""

import math

import pytest
import torch
import torch.nn.functional as F

import liger_compile

BATCH, HEADS, GROUPS, LENGTH, SIZE = 2, 4, 2, 12, 16


def inputs(groups=GROUPS, dtype=torch.float32, length=LENGTH):
    def heads(count, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(BATCH, length, count, SIZE, generator=generator).to(dtype).transpose(1, 2)

    return tuple(heads(n, seed) for seed, n in enumerate((HEADS, groups, groups)))


def lower(q):
    return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()


def lowest(x):
    return torch.finfo(x.dtype).min


def additive(q, hidden=None):
    return torch.zeros(q.shape[-2], q.shape[-2], dtype=q.dtype).masked_fill(
        ~lower(q), lowest(q) if hidden is None else hidden
    )


def repeat_kv(x):
    batch, groups, length, size = x.shape
    return (
        x[:, :, None].expand(batch, groups, HEADS // groups, length, size).reshape(batch, HEADS, length, size)
    )


def hugging_face(q, k, v):
    k, v = repeat_kv(k), repeat_kv(v)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3 + additive(q)[None, None]
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def meta_llama(q, k, v):
    k, v = (torch.repeat_interleave(x, HEADS // GROUPS, dim=1) for x in (k, v))
    mask = torch.full((q.shape[-2], q.shape[-2]), float("-inf")).triu(1).type_as(q)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(SIZE)
    scores = scores + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


def nanogpt(q, k, v):
    k, v = repeat_kv(k), repeat_kv(v)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(lower(q)[None, None] == 0, float("-inf"))
    return F.softmax(att, dim=-1) @ v


def gpt2(q, k, v):
    k, v = repeat_kv(k), repeat_kv(v)
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / torch.full([], SIZE**0.5, dtype=q.dtype)
    scores = torch.where(lower(q), scores, torch.full([], lowest(q), dtype=q.dtype))
    return torch.matmul(F.softmax(scores, dim=-1).type(v.dtype), v)


def on_q(q, k, v):
    return ((q * 0.25) @ repeat_kv(k).mT + additive(q, -math.inf)).softmax(-1) @ repeat_kv(v)


def on_k(q, k, v):
    return (q @ (repeat_kv(k).transpose(-1, -2) * 0.25) + additive(q)).softmax(-1) @ repeat_kv(v)


def both_roots(q, k, v):
    root = SIZE**-0.25
    return ((q * root) @ (repeat_kv(k) * root).mT + additive(q)).softmax(-1) @ repeat_kv(v)


def masked_before_scaling(q, k, v):
    return ((q @ repeat_kv(k).mT + additive(q)) / 4).softmax(-1) @ repeat_kv(v)


def filled_before_scaling(q, k, v):
    return ((q @ repeat_kv(k).mT).masked_fill(~lower(q), lowest(q)) / 4).softmax(-1) @ repeat_kv(v)


def two_masks(q, k, v):
    nothing = torch.zeros(q.shape[-2], q.shape[-2], dtype=q.dtype)
    scores = q @ repeat_kv(k).mT * 0.25 + nothing
    return (scores + additive(q)).softmax(-1) @ repeat_kv(v)


def two_kinds_of_masks(q, k, v):
    scores = (q @ repeat_kv(k).mT).masked_fill(~lower(q), lowest(q)) + additive(q)
    return torch.softmax(scores, -1) @ repeat_kv(v)


def einsum(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, repeat_kv(k)) * 0.25
    weights = scores.masked_fill(~lower(q), lowest(q)).softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("bhqk, bhkd -> bhqd", weights, repeat_kv(v))


def einsum_of_tokens(q, k, v):
    q, k = q.transpose(1, 2), repeat_kv(k).transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25
    return torch.einsum("bhqk,bhkd->bhqd", (scores + additive(scores)).softmax(-1), repeat_kv(v))


def bmm(q, k, v):
    q, k, v = (x.reshape(BATCH * HEADS, LENGTH, SIZE) for x in (q, repeat_kv(k), repeat_kv(v)))
    scores = torch.bmm(q, k.transpose(1, 2)).view(BATCH, HEADS, LENGTH, LENGTH) * 0.25
    weights = (scores + additive(scores)).softmax(-1).view(BATCH * HEADS, LENGTH, LENGTH)
    return torch.bmm(weights, v).view(BATCH, HEADS, LENGTH, SIZE)


def baddbmm(q, k, v):
    q, k, v = (x.reshape(BATCH * HEADS, LENGTH, SIZE) for x in (q, repeat_kv(k), repeat_kv(v)))
    empty = torch.empty(BATCH * HEADS, LENGTH, LENGTH, dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=0.25)
    scores = scores.view(BATCH, HEADS, LENGTH, LENGTH) + additive(q)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), v).unflatten(0, (BATCH, HEADS))


def in_float32(q, k, v):
    scores = (q.float() @ repeat_kv(k).float().mT) * 0.25 + additive(q).float()
    return scores.softmax(-1).to(v.dtype) @ repeat_kv(v)


SPELLINGS = {
    f.__name__: f
    for f in (
        hugging_face,
        meta_llama,
        nanogpt,
        gpt2,
        on_q,
        on_k,
        both_roots,
        masked_before_scaling,
        filled_before_scaling,
        two_masks,
        two_kinds_of_masks,
        einsum,
        einsum_of_tokens,
        bmm,
        baddbmm,
        in_float32,
    )
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_are_one_site_with_the_numbers(liger_is_as_right_as_eager, name, dtype):
    liger_is_as_right_as_eager(SPELLINGS[name], *inputs(dtype=dtype))
    (report,) = liger_compile.reports()
    (site,) = report.sites
    assert (site.kind, site.pattern) == ("replace", "attention.causal")


@pytest.mark.parametrize("name", SPELLINGS)
def test_keys_are_shared_by_heads(run_liger, monkeypatch, name):
    """Nothing of the written-out attention is left, and keys and values are not repeated."""
    from liger_compile import backend

    graphs = []
    compile_graph = backend.compiling.compile_graph

    def keeping(gm, *args, **kwargs):
        graphs.append(gm)
        return compile_graph(gm, *args, **kwargs)

    monkeypatch.setattr(backend.compiling, "compile_graph", keeping)
    run_liger(SPELLINGS[name], *inputs())
    (gm,) = graphs
    names = [node.name for node in gm.graph.nodes if node.op.startswith("call")]
    (attention,) = [n for n in gm.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert attention.kwargs["is_causal"]
    assert not [
        n for n in names if n.startswith(("softmax", "matmul", "bmm", "baddbmm", "einsum", "masked_fill"))
    ]
    if name not in ("on_k", "both_roots"):  # which scale what is repeated already
        assert attention.kwargs["enable_gqa"]
        assert not [n for n in names if n.startswith(("repeat", "expand"))]


def attended(q, k, v, mask=None, p=0.0):
    """Written out, with a mask that is added."""
    scores = q @ repeat_kv(k).transpose(-2, -1) * 0.25
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights if p is None else F.dropout(weights, p)) @ repeat_kv(v)


def sites_and_notes(run_liger, function, *args, **options):
    torch._dynamo.reset()
    result, (report,) = run_liger(function, *args, **options)
    return result, [(s.kind, s.pattern, s.reason) for s in report.sites], report.notes


def test_without_a_mask(run_liger, liger_is_as_right_as_eager):
    _, sites, _ = sites_and_notes(run_liger, attended, *inputs())
    assert sites == [("replace", "attention.unmasked", "")]
    torch._dynamo.reset()
    liger_is_as_right_as_eager(attended, *inputs())


def test_fewer_queries_than_keys_without_a_mask(run_liger):
    q, k, v = inputs()
    result, sites, _ = sites_and_notes(run_liger, attended, q[:, :, :5], k, v)
    assert sites == [("replace", "attention.unmasked", "")]
    torch.testing.assert_close(result, attended(q[:, :, :5], k, v))


def test_one_head_of_keys_for_all_queries(run_liger):
    def f(q, k, v):
        return (q @ k.mT * 0.25 + additive(q)).softmax(-1) @ v

    args = inputs(groups=1)
    result, sites, _ = sites_and_notes(run_liger, f, *args)
    assert sites == [("replace", "attention.causal", "")]
    torch.testing.assert_close(result, f(*args))


def test_autocast(run_liger):
    def f(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return hugging_face(q, k, v)

    args = inputs()
    result, sites, _ = sites_and_notes(run_liger, f, *args)
    assert sites == [("replace", "attention.causal", "")] and result.dtype == torch.bfloat16
    torch.testing.assert_close(result, f(*args), atol=0.02, rtol=0.02)


def test_three_lengths_are_one_graph():
    compiled = torch.compile(
        hugging_face,
        backend="liger",
        options={"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"},
    )
    for length in (5, 12, 31):
        args = inputs(length=length)
        for x in args:
            torch._dynamo.mark_dynamic(x, 2)  # raises if a guard makes it static
            x.requires_grad_()
        expected, result = hugging_face(*args), compiled(*args)
        torch.testing.assert_close(result, expected)
        upstream = torch.randn(result.shape)
        torch.testing.assert_close(
            torch.autograd.grad(result, args, upstream), torch.autograd.grad(expected, args, upstream)
        )
    (report,) = liger_compile.reports()
    assert [site.kind for site in report.sites] == ["replace"]


def test_two_draws_are_two_values(run_liger):
    """As in R-Drop: what reads the second must not be given the first."""

    def norm(x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def written(q, k, v, w):
        return norm(attended(q, k, v, p=0.5), w), norm(attended(q, k, v, p=0.5), w)

    def fused(q, k, v, w):
        k, v = repeat_kv(k), repeat_kv(v)
        first, second = (F.scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2))
        return norm(first, w), norm(second, w)

    for function in (written, fused):
        (first, second), sites, _ = sites_and_notes(run_liger, function, *inputs(), torch.ones(SIZE))
        assert [s[:2] for s in sites].count(("replace", "rms_norm.llama")) == 2
        assert not torch.allclose(first, second)


def bias(q):
    return torch.linspace(-1, 1, q.shape[-2]).expand(q.shape[-2], -1)


def mildly_hidden(q, k, v):
    scores = (q @ repeat_kv(k).mT).masked_fill(~lower(q), -1e9)
    return scores.softmax(-1) @ repeat_kv(v)


def hidden_and_negative(q, k, v):
    return ((q @ repeat_kv(k).mT).masked_fill(lower(q), lowest(q)) * -1.0).softmax(-1) @ repeat_kv(v)


def sinks(q, k, v):
    scores = q @ repeat_kv(k).mT * 0.25 + additive(q)
    scores = torch.cat((scores, torch.ones(BATCH, HEADS, q.shape[-2], 1)), -1)
    return scores.softmax(-1)[..., :-1] @ repeat_kv(v)


def in_another_precision(q, k, v):
    return (q @ repeat_kv(k).mT * 0.25 + additive(q)).softmax(-1).bfloat16() @ repeat_kv(v).bfloat16()


def in_whole_numbers(q, k, v):
    return (q @ repeat_kv(k).mT + additive(q)).softmax(-1).mul(9).long().to(q.dtype) @ repeat_kv(v)


def of_whole_numbers(q, k, v):
    return (q @ repeat_kv(k).mT).long().float().softmax(-1) @ repeat_kv(v)


def written_over(q, k, v):
    scores = q @ repeat_kv(k).mT * 0.25
    scores.masked_fill_(~lower(q), -math.inf)
    return scores.softmax(-1) @ repeat_kv(v)


STAYS = {
    "an added bias": (lambda q, k, v: attended(q, k, v, bias(q) + additive(q)), "for its mask 1x: it"),
    "a mask from outside": (
        lambda q, k, v: attended(q, k, v, v[:, :, 0, :12].mean()),
        "for its mask 1x: its",
    ),
    "-1e9": (mildly_hidden, "1x: it sets hidden scores to -1e+09 instead of -inf"),
    "a negative scale": (hidden_and_negative, "1x: the operand of its softmax"),
    "sinks": (sinks, "1x: its softmax includes scores of no key"),
    "weights of another precision": (in_another_precision, "1x: its scores are of float32 and float32"),
    "scores cut off": (of_whole_numbers, "1x: the operand of its softmax"),
    "written over": (written_over, "1x: the operand of its softmax"),
}


@pytest.mark.parametrize("name", STAYS)
def test_attention_that_stays_written_out_has_a_reason(run_liger, name):
    function, reason = STAYS[name]
    result, sites, (note,) = sites_and_notes(run_liger, function, *inputs())
    assert not sites and note.startswith(f"attention stays written out {reason}")
    torch.testing.assert_close(result, function(*inputs()))


def test_a_softmax_over_something_else_is_no_attention(run_liger):
    def f(q, k, v):
        first = (q @ repeat_kv(k).mT).softmax(-2) @ repeat_kv(v)
        return first, q[..., :LENGTH].softmax(-1) @ v[:, :1], in_whole_numbers(q, k, v)

    result, sites, _ = sites_and_notes(run_liger, f, *inputs())
    assert not sites
    torch.testing.assert_close(result, f(*inputs()))


def test_dropout_is_refused(run_liger):
    def f(q, k, v):
        return attended(q, k, v, additive(q), p=0.25)

    _, ((kind, pattern, reason),), _ = sites_and_notes(run_liger, f, *inputs())
    assert (kind, pattern) == ("leave", "attention.causal")
    assert reason.startswith("it drops weights with probability 0.25; scaled_dot")


def test_weights_that_are_returned_too_do_not_pay(run_liger):
    def f(q, k, v):
        weights = (q @ repeat_kv(k).mT * 0.25 + additive(q)).softmax(-1)
        return weights @ repeat_kv(v), weights

    q, k, v = inputs(length=128)
    result, ((kind, _, reason),), _ = sites_and_notes(run_liger, f, q, k, v, policy="auto")
    assert kind == "leave" and reason == "its scores or weights are used elsewhere as well: weights"
    torch.testing.assert_close(result, f(q, k, v))
    result, ((kind, _, _),), _ = sites_and_notes(
        run_liger, f, q, k, v
    )  # and are still there where that is not asked
    assert kind == "replace"
    torch.testing.assert_close(result, f(q, k, v))


def test_auto_takes_it_on_a_cpu_where_it_pays(run_liger):
    for length, dtype, kind in (
        (12, torch.float32, "leave"),
        (12, torch.bfloat16, "replace"),
        (128, torch.float32, "replace"),
    ):
        _, sites, _ = sites_and_notes(
            run_liger, hugging_face, *inputs(dtype=dtype, length=length), policy="auto"
        )
        assert [site[0] for site in sites] == [kind]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(
    "given", [lambda out: out, lambda out: out.transpose(1, 2).reshape(BATCH, -1, HEADS * SIZE)]
)
def test_a_write_into_the_result_before_backward_changes_no_gradient(given, length):
    """Written out, no step keeps the result for backward; the fused op does."""

    def attention(q, k, v):
        scores = (q @ k.transpose(-1, -2)).masked_fill(~lower(q), float("-inf"))
        return given(scores.softmax(-1) @ v)

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    found = []
    for function in (torch.compile(attention, backend="liger", options=options), attention):
        leaves = [x.clone().requires_grad_() for x in inputs(groups=HEADS, length=length)]
        out = function(*leaves)
        with torch.no_grad():
            out.mul_(2)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        found.append([leaf.grad for leaf in leaves])
    (report,) = liger_compile.reports()
    assert [site.kind for site in report.sites] == ["replace"]
    whole = torch.empty(BATCH, HEADS, length, SIZE)
    is_copied = given(whole).untyped_storage().data_ptr() == whole.data_ptr()
    assert any("1 result of a fused op is copied" in note for note in report.notes) == is_copied
    torch.testing.assert_close(*found)


def test_a_write_into_the_result_before_backward_changes_no_gradient_of_inductor():
    """Inductor removes clones of values that are saved for backward."""

    def attention(q, k, v):
        mask = torch.full((5, 5), -torch.inf).triu(1)
        return (q @ k.transpose(-1, -2) * 0.3 + mask).softmax(-1) @ v

    options = {"liger.strict": True, "liger.policy": "always"}
    found = []
    for function in (torch.compile(attention, backend="liger", options=options), attention):
        torch.manual_seed(0)
        leaves = [torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3)]
        out = function(*leaves)
        out.data.mul_(2)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        found.append([leaf.grad for leaf in leaves])
    assert [site.kind for report in liger_compile.reports() for site in report.sites] == ["replace"]
    torch.testing.assert_close(*found)


def doubled(out):
    return out.mul_(2)


def doubled_without_gradient(out):
    with torch.no_grad():
        out.mul_(2)
    return out * 1


def doubled_unseen_by_autograd(out):
    out.detach().mul_(2)
    return out * 1


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("write", [doubled, doubled_without_gradient, doubled_unseen_by_autograd])
def test_a_write_into_the_result_in_the_graph_changes_no_gradient(write, length):
    def attention(q, k, v):
        scores = (q @ k.transpose(-1, -2)).masked_fill(~lower(q), float("-inf"))
        return write(scores.softmax(-1) @ v)

    options = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}
    found = []
    for function in (torch.compile(attention, backend="liger", options=options), attention):
        leaves = [x.clone().requires_grad_() for x in inputs(groups=HEADS, length=length)]
        out = function(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        found.append((out, [leaf.grad for leaf in leaves]))
    (report,) = liger_compile.reports()
    assert [site.kind for site in report.sites] == ["replace"]
    assert any("1 result of a fused op is copied" in note for note in report.notes)
    torch.testing.assert_close(*found)
