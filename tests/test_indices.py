"""What masks mean: every spelling of a causal mask is proven for all lengths, and none of its false friends."""

import pytest
import torch

from liger_compile.graphs.aliasing import Mutations
from liger_compile.terms.attention import notes_in, sentences
from liger_compile.terms.build import Terms
from liger_compile.terms.indices import mask_meaning
from liger_compile.terms.term import RuleError

BATCH, LENGTH = 2, 6
INF = float("-inf")


def meaning(function, length=LENGTH, keys=None, is_dynamic=False, padding=None):
    """What function(x, y, padding), a mask of the lengths of x and y, means in the graph that Dynamo captures."""
    found = []

    def backend(gm, _):
        terms = Terms(gm.graph, Mutations(gm.graph))
        (out,) = gm.graph.output_node().args[0]
        q, k = (
            next(n.meta["example_value"] for n in gm.graph.nodes if n.name.startswith(f"l_{name}_"))
            for name in ("x", "y")
        )
        sizes = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in (q.shape[1], k.shape[1]))
        env = getattr(q.fake_mode, "shape_env", None)
        guards = len(env.guards) if env else 0
        found.append(mask_meaning(terms.space, terms.of[out], *sizes))
        assert (len(env.guards) if env else 0) == guards
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(BATCH, length, 4)
    y = x.clone() if keys is None else torch.randn(BATCH, keys, 4)
    padding = torch.ones(BATCH, length, dtype=torch.int64) if padding is None else padding

    def touched(x, y, padding):
        assert x.shape[1] == y.shape[1] or keys is not None
        return function(x * 1.5, y * 1.5, padding).clone()  # reads the mask, as attention does

    mask = torch.compile(touched, backend=backend, fullgraph=True, dynamic=is_dynamic)(x, y, padding)
    (only,) = found
    return only, mask


def i_and_j(x):
    i = torch.arange(x.shape[1], device=x.device)
    return i[:, None], i[None, :]


def ones(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


def hugging_face(x, window=None):
    """As transformers 5.23 does where it looks for packed sequences, for a mask without a cache."""
    batch, length = x.shape[:2]
    positions = (torch.arange(length) + 0).unsqueeze(0).expand(batch, -1)
    diff = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    packed = (diff != 1).cumsum(-1)
    b = torch.arange(batch)[:, None, None, None]
    q = (torch.arange(length) + 0)[None, None, :, None]
    k = (torch.arange(length) + 0)[None, None, None, :]
    mask = q.new_ones((), dtype=torch.bool)
    mask = mask & (packed[b, q] == packed[b, k]).to(x.device)
    if window is not None:
        mask = mask & (positions[b, k] > positions[b, q] - window)
    mask = mask & (positions[b, k] <= positions[b, q])
    return mask.expand(batch, -1, length, length)


def additive(x, dtype=torch.float32, hidden=INF):
    i, j = i_and_j(x)
    return torch.where(j <= i, torch.tensor(0.0, dtype=dtype), hidden)


def filled_in_place(x, y, padding):
    mask = torch.zeros(x.shape[1], x.shape[1])
    return mask.masked_fill_(~ones(x).tril(), INF)


def one_minus(x, y, padding):
    return (1.0 - ones(x).tril().float()) * torch.finfo(torch.float32).min


CAUSAL = {
    "tril of ones": lambda x, y, p: ones(x).tril(),
    "torch.tril": lambda x, y, p: torch.tril(ones(x)),
    "not triu": lambda x, y, p: ~ones(x).triu(1),
    "logical_not": lambda x, y, p: torch.logical_not(torch.triu(ones(x), diagonal=1)),
    "integers": lambda x, y, p: torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.int64)).bool(),
    "floats": lambda x, y, p: torch.tril(torch.ones(x.shape[1], x.shape[1])) == 1,
    "triu is zero": lambda x, y, p: torch.triu(torch.ones(x.shape[1], x.shape[1]), diagonal=1) == 0,
    "i >= j": lambda x, y, p: i_and_j(x)[0] >= i_and_j(x)[1],
    "j <= i": lambda x, y, p: i_and_j(x)[1] <= i_and_j(x)[0],
    "j < i + 1": lambda x, y, p: i_and_j(x)[1] < i_and_j(x)[0] + 1,
    "i > j - 1": lambda x, y, p: i_and_j(x)[0] > i_and_j(x)[1] - 1,
    "i - j >= 0": lambda x, y, p: i_and_j(x)[0] - i_and_j(x)[1] >= 0,
    "torch.ge": lambda x, y, p: torch.ge(torch.arange(x.shape[1]).view(-1, 1), torch.arange(x.shape[1])),
    "not less": lambda x, y, p: ~(i_and_j(x)[0] < i_and_j(x)[1]),
    "shifted": lambda x, y, p: i_and_j(x)[0] + 3 >= i_and_j(x)[1] + 3,
    "shifted by the length": lambda x, y, p: i_and_j(x)[0] + x.shape[1] >= i_and_j(x)[1] + x.shape[1],
    "negated": lambda x, y, p: -i_and_j(x)[0] <= -i_and_j(x)[1],
    "int32": lambda x, y, p: i_and_j(x)[0].int() >= i_and_j(x)[1].int(),
    "transposed": lambda x, y, p: (i_and_j(x)[0] <= i_and_j(x)[1]).t(),
    "sliced": lambda x, y, p: torch.ones(64, 64, dtype=torch.bool).tril()[: x.shape[1], : x.shape[1]],
    "shifted slices": lambda x, y, p: torch.arange(70)[3 : x.shape[1] + 3, None] >= torch.arange(64)[: x.shape[1]] + 3,
    "expanded": lambda x, y, p: ones(x).tril()[None, None].expand(x.shape[0], 1, -1, -1),
    "and": lambda x, y, p: ones(x).tril() & ones(x),
    "twice": lambda x, y, p: ones(x).tril() & (i_and_j(x)[0] >= i_and_j(x)[1]),
    "weaker": lambda x, y, p: ones(x).tril() & (i_and_j(x)[1] < i_and_j(x)[0] + 5),
    "or stronger": lambda x, y, p: ones(x).tril() | (i_and_j(x)[1] < i_and_j(x)[0] - 2),
    "or a key that it has": lambda x, y, p: ones(x).tril() | (i_and_j(x)[1] == 0) & (i_and_j(x)[0] == 2),
    "times": lambda x, y, p: ones(x).tril() * ones(x),
    "filled": lambda x, y, p: ones(x).masked_fill(i_and_j(x)[1] > i_and_j(x)[0], False),
    "where of integers": lambda x, y, p: torch.where(i_and_j(x)[0] >= i_and_j(x)[1], 1, 0) > 0,
    "as it is gathered": lambda x, y, p: torch.arange(x.shape[1])[i_and_j(x)[0]] >= i_and_j(x)[1],
    "as it is counted": lambda x, y, p: ones(x)[0].cumsum(-1)[:, None] > i_and_j(x)[1],
    "additive": lambda x, y, p: additive(x),
    "additive bfloat16": lambda x, y, p: additive(x, torch.bfloat16, torch.finfo(torch.bfloat16).min),
    "additive full": lambda x, y, p: torch.full((x.shape[1], x.shape[1]), INF).triu(1),
    "additive filled": lambda x, y, p: torch.zeros(x.shape[1], x.shape[1]).masked_fill(ones(x).triu(1), INF),
    "additive in place": filled_in_place,
    "one minus": one_minus,
    "hugging face": lambda x, y, p: hugging_face(x),
}  # fmt: skip


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_are_proven(name, is_dynamic):
    found, mask = meaning(CAUSAL[name], is_dynamic=is_dynamic)
    assert found.kind == "causal", found.reason
    assert_means(mask, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())


def assert_means(mask, expected):
    """The mask that ran is what it was found to mean."""
    lets_through = mask if mask.dtype is torch.bool else mask > -1e30
    assert torch.equal(lets_through.expand(BATCH, 1, *expected.shape), expected.expand(BATCH, 1, -1, -1))


ALL = {
    "ones": lambda x, y, p: ones(x),
    "zeros added": lambda x, y, p: torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1]),
    "positions are positive": lambda x, y, p: (i_and_j(x)[0] >= 0) & (i_and_j(x)[1] < x.shape[1]),
    "one document": lambda x, y, p: (ones(x)[0] * 0).cumsum(-1)[:, None] == (ones(x)[0] * 0).cumsum(-1),
    "filled in nowhere": lambda x, y, p: torch.zeros(x.shape[1], x.shape[1]).masked_fill(~ones(x), INF),
}


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ALL)
def test_masks_that_hide_nothing_are_proven(name, is_dynamic):
    found, mask = meaning(ALL[name], is_dynamic=is_dynamic)
    assert found.kind == "all", found.reason
    assert_means(mask, torch.ones(LENGTH, LENGTH, dtype=torch.bool))


def padded(x, y, p):
    return ones(x).tril() & p.bool()[:, None, None, :]


def written_over(x, y, p):
    mask = ones(x).tril()
    mask[0, 1] = True
    return mask


def packed(x, y, p):
    documents = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (ones(x).tril() & (documents[:, :, None] == documents[:, None, :]))[:, None]


def another_in_each_row(x, y, p):
    i = torch.arange(x.shape[1])
    b = torch.arange(x.shape[0])[:, None, None, None]
    return i[None, None, None, :] <= i[None, None, :, None] + b


def learned(x, y, p):
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill(ones(x).triu(1), INF) + x[0, :, :1] * 0.0


FALSE_FRIENDS = {
    "tril(-1)": lambda x, y, p: ones(x).tril(-1),
    "tril(1)": lambda x, y, p: ones(x).tril(1),
    "triu": lambda x, y, p: ones(x).triu(),
    "not triu(0)": lambda x, y, p: ~ones(x).triu(),
    "not tril": lambda x, y, p: ~ones(x).tril(),
    "j < i": lambda x, y, p: i_and_j(x)[1] < i_and_j(x)[0],
    "j >= i": lambda x, y, p: i_and_j(x)[1] >= i_and_j(x)[0],
    "j == i": lambda x, y, p: i_and_j(x)[1] == i_and_j(x)[0],
    "j != i": lambda x, y, p: i_and_j(x)[1] != i_and_j(x)[0],
    "j <= i + 1": lambda x, y, p: i_and_j(x)[1] <= i_and_j(x)[0] + 1,
    "j <= 2 i": lambda x, y, p: i_and_j(x)[1] <= 2 * i_and_j(x)[0],
    "every second": lambda x, y, p: torch.arange(0, 2 * x.shape[1], 2)[:, None] >= i_and_j(x)[1],
    "offset by a cache": lambda x, y, p: torch.arange(3, x.shape[1] + 3)[:, None] >= i_and_j(x)[1],
    "window": lambda x, y, p: ones(x).tril() & (i_and_j(x)[1] > i_and_j(x)[0] - 3),
    "window by triu": lambda x, y, p: ones(x).tril() & ones(x).triu(-2),
    "hugging face's window": lambda x, y, p: hugging_face(x, 3),
    "prefix": lambda x, y, p: ones(x).tril() | (i_and_j(x)[1] < 2),
    "blocks": lambda x, y, p: i_and_j(x)[1] // 2 <= i_and_j(x)[0] // 2,
    "chunks": lambda x, y, p: ones(x).tril() & (i_and_j(x)[1] // 3 == i_and_j(x)[0] // 3),
    "one key": lambda x, y, p: ones(x).tril() | (i_and_j(x)[1] == 4) & (i_and_j(x)[0] == 2),
    "all keys of one query": lambda x, y, p: ones(x).tril() | (i_and_j(x)[0] == 2),
    "a query without keys": lambda x, y, p: ones(x).tril() & (i_and_j(x)[0] != 2),
    "nothing": lambda x, y, p: ~ones(x),
    "first row alone": lambda x, y, p: ones(x).tril()[:1],
    "sliced from elsewhere": lambda x, y, p: torch.ones(64, 64).tril()[1 : x.shape[1] + 1, : x.shape[1]] > 0,
    "flipped": lambda x, y, p: ones(x).tril().flip(-1),
    "transposed": lambda x, y, p: ones(x).tril().t(),
    "another in each row of the batch": another_in_each_row,
    "padding": padded,
    "by the positions given": lambda x, y, p: (p.cumsum(-1)[:, None, :] <= p.cumsum(-1)[:, :, None])[:, None],
    "written over": written_over,
    "hides half": lambda x, y, p: torch.full((x.shape[1], x.shape[1]), -5.0).triu(1),
    "flags added": lambda x, y, p: ones(x).tril().float(),
    "anti-causal added": lambda x, y, p: torch.full((x.shape[1], x.shape[1]), INF).tril(-1),
    "learned": learned,
    "where, the method": lambda x, y, p: ones(x).where(ones(x).tril(), ones(x)),
    "compared after rounding": lambda x, y, p: additive(x, torch.float16, -1e31) > -1e32,
    "alibi": lambda x, y, p: torch.where(i_and_j(x)[1] <= i_and_j(x)[0], (i_and_j(x)[1] - i_and_j(x)[0]) * 0.5, INF),
    "negative positions": lambda x, y, p: torch.arange(x.shape[1])[i_and_j(x)[0] - 1] >= i_and_j(x)[1],
    "half positions": lambda x, y, p: i_and_j(x)[0] >= i_and_j(x)[1] * 0.5,
    "0 times infinity": lambda x, y, p: ones(x).triu(1).float() * INF,
    "random": lambda x, y, p: ones(x).tril() & (torch.rand(x.shape[1], x.shape[1]) < 2),
}  # fmt: skip
# Of these the numbers happen to be causal ones today.
TODAY = (
    "padding",
    "by the positions given",
    "learned",
    "random",
    "compared after rounding",
)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FALSE_FRIENDS)
def test_false_friends_are_refused(name, is_dynamic):
    found, mask = meaning(FALSE_FRIENDS[name], is_dynamic=is_dynamic)
    assert found.kind in ("unknown", "window", *(("padded",) if name == "padding" else ())) and found.reason
    assert bool(found.padding) == (name == "padding")
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    if mask.dtype is not torch.bool:
        causal = torch.zeros(causal.shape).masked_fill(~causal, INF)
    is_causal = torch.equal(mask.expand(causal.shape).to(causal.dtype), causal)
    assert is_causal == (name in TODAY)


def test_reasons_name_what_was_not_read():
    assert "values of l_padding_" in meaning(FALSE_FRIENDS["by the positions given"])[0].reason
    assert "values of floordiv" in meaning(FALSE_FRIENDS["blocks"])[0].reason
    assert "lets through +1*key -1*query -1 <= 0" in meaning(FALSE_FRIENDS["tril(1)"])[0].reason
    assert "computes -5 in float32" in meaning(FALSE_FRIENDS["hides half"])[0].reason


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
def test_padding_is_distinguished_from_other_unknown_masks(is_dynamic):
    def to_none(x, y, p):
        return (1.0 - p[:, None, None, :].float()) * torch.finfo(torch.float32).min

    for build, kind, reason in (
        (padded, "padded", "it is causal except for the padding in l_padding_"),
        (to_none, "unknown", "it hides nothing except for the padding in l_padding_"),
    ):
        found, _ = meaning(build, is_dynamic=is_dynamic)
        assert (found.kind, found.reason, found.padding) == (kind, reason, ("l_padding_",))


def test_a_window_is_as_wide_as_it_is():
    found, mask = meaning(lambda x, y, p: hugging_face(x, 3), is_dynamic=True)
    assert (found.kind, found.window) == ("window", 3)
    assert mask[0, 0].sum(-1).max() == 3


def test_a_window_no_smaller_than_the_sequence_is_causal():
    assert meaning(lambda x, y, p: hugging_face(x, 6))[0].kind == "causal"
    assert meaning(lambda x, y, p: hugging_face(x, 5))[0].kind == "window"
    found, _ = meaning(lambda x, y, p: hugging_face(x, 4096), is_dynamic=True)
    assert (found.kind, found.window) == ("window", 4096)  # other lengths are longer


def test_a_slice_from_the_end_is_causal_for_one_length_only():
    def build(x, y, padding):
        return torch.arange(64)[-x.shape[1] :, None] - 58 >= torch.arange(x.shape[1])

    assert meaning(build)[0].kind == "causal"
    assert meaning(build, is_dynamic=True)[0].kind == "unknown"


def rectangle(x, y, padding):
    return torch.arange(y.shape[1]) <= torch.arange(x.shape[1])[:, None]


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
def test_as_many_queries_as_keys(is_dynamic):
    found, _ = meaning(rectangle, keys=LENGTH + 3, is_dynamic=is_dynamic)
    assert found.kind == "unknown" and "not as many queries as keys" in found.reason
    found, _ = meaning(lambda x, y, p: rectangle(x, x, p), keys=LENGTH + 3, is_dynamic=is_dynamic)
    assert found.kind == "unknown" and "its shape" in found.reason


def test_attention_that_keeps_its_mask_has_a_reason():
    found = []

    def backend(gm, _):
        terms = Terms(gm.graph, Mutations(gm.graph))
        node = next(n for n in gm.graph.nodes if n.name == "attend")
        found.extend(sentences(notes_in(terms.space, [terms.of[node]])))
        return gm.forward

    def attend(x, y):
        mask = torch.arange(y.shape[2]) <= torch.arange(x.shape[2])[:, None]
        attend = torch.nn.functional.scaled_dot_product_attention(x, y, y, mask)
        return attend * 2

    x, y = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)
    torch._dynamo.mark_dynamic(x, 2)
    torch._dynamo.mark_dynamic(y, 2)
    torch.compile(attend, backend=backend, fullgraph=True)(x, y)
    (note,) = found
    assert note.startswith("attention keeps its mask 1x") and "not as many queries as keys" in note


@pytest.mark.parametrize("strict", [False, True])
def test_a_proof_that_fails_is_a_reason_and_raises_under_strict(strict: bool):
    graph = torch.fx.Graph()
    space = Terms(graph, Mutations(graph), strict=strict).space
    no_start = space.intern("arange", (), (), torch.int64, (LENGTH,))
    mask = space.intern("cast", (no_start,), (), torch.bool, (LENGTH, LENGTH))
    if strict:
        with pytest.raises(RuleError, match="the proof about its mask failed: ValueError"):
            mask_meaning(space, mask, LENGTH, LENGTH)
    else:
        found = mask_meaning(space, mask, LENGTH, LENGTH)
        assert found.kind == "unknown"
        assert found.reason.startswith("the proof about its mask failed: ValueError")
