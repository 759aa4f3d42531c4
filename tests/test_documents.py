"""Packed rows: masks that let every document of a row see only itself are proven, and their false friends are not."""

import pytest
import torch

import liger_compile
from liger_compile.patterns.attention import forcing_varlen
from tests.test_indices import BATCH, LENGTH, hugging_face, i_and_j, meaning, ones

# Positions that begin again: documents of 2, 3 and 1 tokens in one row, of 1 and 5 in the other.
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]])
# Document 1 begins again after document 2, and ids do not rise.
IDS = torch.tensor([[1, 1, 2, 1, 0, 0], [7, 7, 7, 7, -3, -3]])


def same(ids):
    return (ids[:, :, None] == ids[:, None, :])[:, None]


def causal(x):
    return ones(x).tril()


def of_positions(p):
    return (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def packed(x, y, p, window=None, remapped=True):
    """As transformers 5.24 with position_ids; up to 5.17 the positions of the row are compared (not `remapped`)."""
    batch, length = p.shape
    ids = of_positions(p)
    b = torch.arange(batch, device=p.device)[:, None, None, None]
    q = (torch.arange(length, device=p.device) + 0)[None, None, :, None]
    k = (torch.arange(length, device=p.device) + 0)[None, None, None, :]
    at_q, at_k = (p[b, q], p[b, k]) if remapped else (q, k)
    mask = q.new_ones((), dtype=torch.bool)
    if window is not None:
        mask = mask & (at_k > at_q - window)
    mask = mask & (at_k <= at_q)
    mask = mask & (ids[b, q] == ids[b, k])
    return mask.expand(batch, -1, length, length)


def of_lengths(x, y, p):
    ends = torch.tensor([2, 5, 6])
    ids = torch.searchsorted(ends, torch.arange(x.shape[1]), right=True)
    return causal(x) & (ids[:, None] == ids)


def repeated(x, y, p):
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 3, 2]), output_size=LENGTH)
    return causal(x) & (ids[:, None] == ids)


def filled(x, y, p):
    return torch.zeros(()).expand(BATCH, 1, *ones(x).shape).masked_fill(~(causal(x) & same(p)), float("-inf"))


def one_minus(x, y, p):
    return (1.0 - (causal(x) & same(p)).float()) * torch.finfo(torch.float32).min


CAUSAL = {
    "ids": lambda x, y, p: causal(x) & same(p),
    "the key first": lambda x, y, p: causal(x) & (p[:, None, None, :] == p[:, None, :, None]),
    "not different": lambda x, y, p: ~(ones(x).triu(1) | (p[:, None, :, None] != p[:, None, None, :])),
    "no difference": lambda x, y, p: causal(x) & (p[:, None, :, None] - p[:, None, None, :] == 0),
    "shifted alike": lambda x, y, p: causal(x) & (p[:, None, :, None] + 1 == p[:, None, None, :] + 1),
    "32 bits": lambda x, y, p: causal(x) & same(p.int()),
    "8 bits": lambda x, y, p: causal(x) & same(p.to(torch.int8)),
    "products": lambda x, y, p: causal(x) & same(p * 3 % 5),
    "starts": lambda x, y, p: causal(x) & same((p == 0).cumsum(-1)),
    "differences": lambda x, y, p: causal(x) & same(of_positions(p)),
    "transformers": packed,
    "transformers 5.17": lambda x, y, p: packed(x, y, p, remapped=False),
    "expanded": lambda x, y, p: causal(x) & same(p[:1].expand(BATCH, -1)),
    "one row": lambda x, y, p: causal(x) & (p[0][:, None] == p[0]),
    "sliced": lambda x, y, p: causal(x) & same(torch.cat((p, p), -1)[:, 1 : p.shape[1] + 1]),
    "lengths": of_lengths,
    "repeated": repeated,
    "blocks": lambda x, y, p: causal(x) & same(torch.arange(x.shape[1]).expand(BATCH, -1) // 3),
    "floats as ids": lambda x, y, p: causal(x) & same(p.double().long()),
    "added": filled,
    "one minus": one_minus,
    "window of all": lambda x, y, p: packed(x, y, p, LENGTH),
}
OTHERS = {
    "bidirectional": (lambda x, y, p: same(p), "all", None),
    "bidirectional, by positions": (lambda x, y, p: same(of_positions(p)), "all", None),
    "window": (lambda x, y, p: packed(x, y, p, 2), "window", 2),
    "window, of the row": (lambda x, y, p: packed(x, y, p, 2, remapped=False), "window", 2),
    "window and ids": (lambda x, y, p: hugging_face(x, 3) & same(p), "window", 3),
}


def let_through(mask):
    return mask if mask.dtype is torch.bool else mask > -1e30


# Each mask of one length; every second one, and transformers', of all lengths.
NAMES = [*CAUSAL, *OTHERS]
OF_ALL_LENGTHS = [
    name
    for at, name in enumerate(NAMES)
    if (at % 2 == 0 or "transformers" in name) and name not in ("lengths", "repeated", "window of all")
]


@pytest.mark.parametrize(
    ("name", "is_dynamic"), [*((name, False) for name in NAMES), *((name, True) for name in OF_ALL_LENGTHS)]
)
def test_documents_are_proven(name, is_dynamic):
    build, within, window = (CAUSAL[name], "causal", None) if name in CAUSAL else OTHERS[name]
    by_positions = "positions" in name or "differences" in name or "window" in name or "transformers" in name
    given = POSITIONS if by_positions else IDS
    found, mask = meaning(build, is_dynamic=is_dynamic, padding=given)
    assert (found.kind, found.within, found.window) == ("documents", within, window), found.reason
    assert found.documents.shape[-1] == mask.shape[-1] or is_dynamic
    expected = build(torch.empty(BATCH, LENGTH, 4), None, given)
    assert torch.equal(
        let_through(mask).expand(BATCH, 1, -1, -1), let_through(expected).expand(BATCH, 1, -1, -1)
    )


def another_order(x, y, p):
    return causal(x) & (p[:, None, :, None] == p.flip(0)[:, None, None, :])


def of_first_row(x, y, p):
    return causal(x) & (p[:, None, :, None] == p[:1, None, None, :])


FALSE_FRIENDS = {
    "ids of another row": another_order,
    "ids of the first row": of_first_row,
    "ids of the next token": lambda x, y, p: causal(x) & (p.roll(-1)[:, None, :, None] == p[:, None, None, :]),
    "less": lambda x, y, p: causal(x) & (p[:, None, :, None] < p[:, None, None, :]),
    "at least": lambda x, y, p: causal(x) & (p[:, None, :, None] >= p[:, None, None, :]),
    "different": lambda x, y, p: causal(x) & ~same(p),
    "or causal": lambda x, y, p: causal(x) | same(p),
    "not itself": lambda x, y, p: ones(x).tril(-1) & same(p),
    "rounded": lambda x, y, p: causal(x) & same(p.to(torch.bfloat16)),
    "of floats": lambda x, y, p: causal(x) & same(x[..., 0]),
    "flags": lambda x, y, p: causal(x) & same(p > 0),
    "one of them changed": lambda x, y, p: causal(x) & (p[:, None, :, None] == p[:, None, None, :] * 2),
    "one of them shifted": lambda x, y, p: causal(x) & (p[:, None, :, None] == p[:, None, None, :] + 1),
    "one of them narrow": lambda x, y, p: causal(x) & (p.to(torch.int8)[:, None, :, None] == p[:, None, None, :]),
    "two kinds of ids": lambda x, y, p: causal(x) & same(p) & same(p // 2),
    "prefix": lambda x, y, p: (causal(x) | (i_and_j(x)[1] < 2)) & same(p),
    "or the first document": lambda x, y, p: causal(x) & (same(p) | (p == 0)[:, None, None, :]),
    "without padding": lambda x, y, p: causal(x) & same(p) & (p != 0)[:, None, None, :],
    "positions, by starts": lambda x, y, p: (p[:, None, None, :] <= p[:, None, :, None])
    & same((p == 0).cumsum(-1)),
    "positions of others": lambda x, y, p: (p[:, None, None, :] <= p[:, None, :, None]) & same(of_positions(p * 2)),
    "other steps": lambda x, y, p: (p[:, None, None, :] <= p[:, None, :, None])
    & same((torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 2).cumsum(-1)),
    "steps along the batch": lambda x, y, p: (p[:, None, None, :] <= p[:, None, :, None])
    & same((torch.diff(p, prepend=p[:1] - 1, dim=0) != 1).cumsum(-1)),
    "sums along the batch": lambda x, y, p: (p[:, None, None, :] <= p[:, None, :, None])
    & same((torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(0)),
    "32-bit positions": lambda x, y, p: packed(x, y, p.int()),
    "by heads": lambda x, y, p: causal(x) & (p[:, :, None] == p[:, None, :]),
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE_FRIENDS)
def test_false_friends_are_refused(name):
    is_dynamic = list(FALSE_FRIENDS).index(name) % 2 == 0
    found, _ = meaning(FALSE_FRIENDS[name], is_dynamic=is_dynamic, padding=POSITIONS)
    assert found.kind == "unknown" and found.reason and not found.documents


def test_padding_beside_documents_is_named():
    build = lambda x, y, p: packed(x, y, p) & (x[..., 0] > 0)[:, None, None, :]  # noqa: E731
    assert meaning(build, padding=POSITIONS)[0].padding == ()


def test_as_many_queries_as_keys():
    build = lambda x, y, p: p[:, None, : x.shape[1], None] == p[:, None, None, :]  # noqa: E731
    found, _ = meaning(build, keys=LENGTH + 2, padding=torch.zeros(BATCH, LENGTH + 2, dtype=torch.int64))
    assert found.kind == "unknown" and "not as many queries as keys" in found.reason


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("Llama", ["documents", "documents"]),
        ("Gemma2", ["capped_documents_window", "capped_documents"]),
    ],
)
def test_models_of_transformers_with_positions_that_begin_again(name, patterns):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(vocab_size=64, num_hidden_layers=2, head_dim=8, **sizes)
    if name == "Gemma2":
        config.sliding_window, config._attn_implementation = 3, "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    options = {"liger.inner": "eager", "liger.strict": True, "liger.policy": "always"}
    compiled = torch.compile(model, backend="liger", options=options)
    ids = torch.randint(0, 64, (BATCH, LENGTH))
    found = []
    for step in (model, compiled):
        model.zero_grad()
        loss = step(ids, position_ids=POSITIONS, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    (report,) = liger_compile.reports()
    replaced = [site.pattern for site in report.sites if site.pattern.startswith("attention")]
    assert replaced == [f"attention.{pattern}" for pattern in patterns]
    assert any("causal within documents of position_ids: flex_attention" in note for note in report.notes)


LENGTHS = (3000 // 8, 2500 // 8, 1500 // 8, 1192 // 8)  # no whole number of tiles


def attention_of_positions(window):
    def attention(q, k, v, positions):
        mask = packed(q[:, 0], None, positions, window)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return attention


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_varlen", [False, True], ids=["flex", "varlen"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.float16, 96),
        (torch.bfloat16, 256),
        (torch.float32, 64),
    ],
)
def test_numbers_of_the_kernels(liger_is_as_right_as_eager, dtype, size, window, is_varlen):
    torch.manual_seed(0)
    length = sum(LENGTHS)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).cuda()
    positions = torch.stack((positions, torch.arange(length, device="cuda") % 300))
    q, k, v = (torch.randn(BATCH, length, n, size, device="cuda") for n in (4, 2, 2))
    heads = [x.to(dtype).transpose(1, 2) for x in (q, k, v)]
    with forcing_varlen(is_varlen):
        liger_is_as_right_as_eager(attention_of_positions(window), *heads, positions, inner="inductor")
    (report,) = liger_compile.reports()
    assert [site.pattern for site in report.sites] == [f"attention.documents{'_window' if window else ''}"]
