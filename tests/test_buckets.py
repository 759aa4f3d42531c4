"""DDP cuts graphs in buckets: masks that say something are made in the part that reads them."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.distributed import SubmodCompiler
from torch._guards import TracingContext
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import liger_compile
from bench.ddp_kept import kept_bytes
from liger_compile.backend import liger
from liger_compile.forward_passes import specialize
from liger_compile.forward_passes.buckets import FEWEST_PARTS, make_masks_where_they_are_read, padding_in
from tests.models.harness import step

BATCH, HEADS, LENGTH, SIZE = 2, 4, 12, 8
OPTIONS = {"liger.inner": "aot_eager", "liger.strict": True, "liger.policy": "always"}


def positions(x):
    at = torch.arange(x.shape[-2], device=x.device)
    return at[None, :] <= at[:, None]


def attend(x, mask):
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def shared(x, padding):
    """One mask for all layers."""
    mask = positions(x)[None, None].expand(x.shape[0], 1, -1, -1)
    for _ in range(3):
        x = attend(x, mask)
    return x


def sliced(x, padding):
    """Each layer takes its part."""
    mask = positions(x)[None, None]
    for _ in range(3):
        x = attend(x, mask[:, :, :, : x.shape[-2]])
    return x


def windowed(x, padding):
    at = torch.arange(x.shape[-2], device=x.device)
    mask = positions(x) & (at[None, :] > at[:, None] - 4)
    return attend(attend(x, mask), mask)


def like_an_activation(x, padding):
    """What it is made like is computed once all the same."""
    scores = torch.exp(x @ x.mT)
    mask = torch.ones_like(scores, dtype=torch.bool).tril()
    return attend(attend(x, mask), mask)


def padded(x, padding):
    mask = positions(x) & padding[:, None, None, :]
    return attend(attend(x, mask), mask)


def written(x, padding):
    mask = positions(x)
    result = attend(attend(x, mask), mask)
    mask.fill_(True)
    return attend(result, mask)


def captured(function):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append((gm, example_inputs))
        return gm

    x, padding = torch.randn(BATCH, HEADS, LENGTH, SIZE), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    padding[0, :3] = False
    result = torch.compile(function, backend=backend, fullgraph=True)(x, padding)
    ((gm, inputs),) = graphs
    return gm, inputs, result


def masks_of(gm):
    return [node.kwargs["attn_mask"] for node in gm.graph.nodes if "attn_mask" in node.kwargs]


@pytest.mark.parametrize("function", [shared, sliced, windowed, like_an_activation])
def test_each_reader_has_a_mask_of_its_own(function):
    gm, inputs, expected = captured(function)
    make_masks_where_they_are_read(gm.graph)
    gm.graph.lint()
    gm.recompile()
    masks = masks_of(gm)
    assert len({*masks}) == len(masks) > 1
    assert torch.equal(gm(*inputs)[0], expected)
    at = {node: position for position, node in enumerate(gm.graph.nodes)}
    for reader in [node for node in gm.graph.nodes if "attn_mask" in node.kwargs][1:]:
        before = [node for node in at if at[node] < at[reader]]
        assert before[-1] is reader.kwargs["attn_mask"]  # right before it
    assert len([node for node in gm.graph.nodes if node.target is torch.exp]) == (
        function is like_an_activation
    )
    assert all(node.users or node.op in ("output", "placeholder") for node in gm.graph.nodes)


@pytest.mark.parametrize("function", [padded, written])
def test_other_masks_stay(function):
    gm, _, _ = captured(function)
    before = [(node.name, node.target, node.args, node.kwargs) for node in gm.graph.nodes]
    make_masks_where_they_are_read(gm.graph)
    assert [(node.name, node.target, node.args, node.kwargs) for node in gm.graph.nodes] == before


def pooled(x, padding):
    """Flags that are no mask of attention."""
    return (attend(x, positions(x)) * padding[:, None, :, None]).sum(2) / padding[:, None, :].sum(
        -1, keepdim=True
    )


@pytest.mark.parametrize(("function", "times"), [(shared, 0), (padded, 1), (pooled, 0)])
def test_padding_is_what_masks_are_causal_but_for(function, times):
    gm, _, _ = captured(function)
    assert len(padding_in(gm.graph)) == times


def test_parts_compile_where_the_guard_of_an_earlier_part_is_collected_late(process_group, monkeypatch):
    """What the guard's `__del__` does, done while each part is compiled."""
    compile_submod = SubmodCompiler.compile_submod

    def collected_late(self, *args):
        TracingContext.get().fakify_first_call = False
        return compile_submod(self, *args)

    monkeypatch.setattr(SubmodCompiler, "compile_submod", collected_late)
    torch.manual_seed(0)
    model, x = Model(), torch.randn(BATCH, LENGTH, 512)
    expected = gradients(model, model, x)
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    compiled = torch.compile(ddp, backend="liger", options={**OPTIONS, "liger.inner": "inductor"})
    torch.testing.assert_close(gradients(compiled, model, x), expected)
    assert [report.variant for report in liger_compile.reports()] == [""] * 3


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(512, 512)  # 1 MiB

    def forward(self, x, mask):
        return x + attend(self.inner(x).unflatten(-1, (HEADS, -1)).transpose(1, 2), mask).transpose(
            1, 2
        ).flatten(2)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x, padding=None):
        mask = positions(x)[None, None]
        if padding is not None:
            mask = mask & padding[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        return x.square().mean()


def gradients(function, model, *args):
    """By backward(), whose hooks are DDP's."""
    return step(lambda _, *args: function(*args), model, *args).gradients


def found():
    """How often attention was found in each variant of the graph, and in how many parts that is."""
    parts = {}
    for report in liger_compile.reports():
        times = sum(site.pattern == "attention.causal" for site in report.sites)
        before = parts.get(report.variant, (0, 0))
        parts[report.variant] = before[0] + times, before[1] + 1
    return parts


@pytest.mark.parametrize("backend", ["liger", liger])
def test_attention_is_found_in_every_part(process_group, backend):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(BATCH, LENGTH, 512)
    expected = gradients(model, model, x)
    ddp = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=backend, options=OPTIONS)
    torch.testing.assert_close(gradients(ddp, model, x), expected)
    assert found() == {"": (3, 3)}
    notes = [note for report in liger_compile.reports() for note in report.notes]
    assert not any("keeps its mask" in note or "one layer of a model" in note for note in notes)


@pytest.mark.parametrize(
    ("inner", "num_parts", "first"),
    [
        ("aot_eager", 3, specialize.WITHOUT),
        ("aot_eager", 1, specialize.WITHOUT),
        ("inductor", 3, specialize.GENERIC),
    ],
)
def test_calls_without_padding_have_parts_of_their_own(process_group, monkeypatch, inner, num_parts, first):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(BATCH, LENGTH, 512)
    ones, padding = torch.ones(BATCH, LENGTH, dtype=torch.int64), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    padding[0, :3] = 0
    ddp = DistributedDataParallel(model, bucket_cap_mb=1 if num_parts > 1 else 25)
    monkeypatch.setattr(
        "torch.distributed._DEFAULT_FIRST_BUCKET_BYTES", 2**20 if num_parts > 1 else 25 * 2**20
    )
    compiled = torch.compile(ddp, backend="liger", options={**OPTIONS, "liger.inner": inner})
    parts = {specialize.WITHOUT: (3, num_parts), specialize.GENERIC: (0, num_parts)}
    order = (ones, padding) if first == specialize.WITHOUT else (padding, ones)
    for call, mask in enumerate((*order, *order)):
        expected = gradients(model, model, x, mask)
        torch.testing.assert_close(gradients(compiled, model, x, mask), expected)
        assert found() == ({first: parts[first]} if call == 0 else parts)
    assert all("l_padding_ of all ones" in report.notes[0] for report in liger_compile.reports())
    looks = []
    ask = specialize.Dispatch.answer

    def counted(self, args):
        answer = ask(self, args)
        looks.extend([] if answer is None else [answer])  # a part has no assumptions, and no question
        return answer

    monkeypatch.setattr(specialize.Dispatch, "answer", counted)
    compiled(x, padding)
    assert len(looks) == 1


@pytest.mark.parametrize("option", [{"padding": "general"}, {"policy": "never"}, {"skip": ("attention",)}])
def test_options_that_leave_nothing_to_choose(process_group, option):
    model, x = Model(), torch.randn(BATCH, LENGTH, 512)
    ones = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    options = {**OPTIONS, **{f"liger.{name}": value for name, value in option.items()}}
    compiled = torch.compile(
        DistributedDataParallel(model, bucket_cap_mb=1), backend="liger", options=options
    )
    torch.testing.assert_close(gradients(compiled, model, x, ones), gradients(model, model, x, ones))
    assert found() == {"": (0, 3)}


def test_two_lengths_are_symbolic_and_general(process_group):
    model = Model()
    compiled = torch.compile(
        DistributedDataParallel(model, bucket_cap_mb=1), backend="liger", options=OPTIONS
    )
    for length in (LENGTH, 2 * LENGTH, 3 * LENGTH):
        x, ones = torch.randn(BATCH, length, 512), torch.ones(BATCH, length, dtype=torch.int64)
        torch.testing.assert_close(gradients(compiled, model, x, ones), gradients(model, model, x, ones))
    assert found() == {specialize.WITHOUT: (3, 3), "": (0, 3)}


def test_graphs_of_other_backends_are_cut_as_they_come(process_group, monkeypatch, recwarn):
    monkeypatch.setattr("liger_compile.forward_passes.buckets.mask_meaning", operator.truediv)  # would warn
    ddp, x = DistributedDataParallel(Model(), bucket_cap_mb=1), torch.randn(BATCH, LENGTH, 512)
    torch.compile(ddp, backend="aot_eager")(x).backward()
    assert not any("liger_compile" in str(warning.message) for warning in recwarn)


def test_a_failure_is_a_warning(process_group, monkeypatch):
    monkeypatch.setattr("liger_compile.forward_passes.buckets.mask_meaning", operator.truediv)
    model, x = Model(), torch.randn(BATCH, LENGTH, 512)
    expected = gradients(model, model, x)
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    compiled = torch.compile(ddp, backend="liger", options={**OPTIONS, "liger.strict": False})
    with pytest.warns(
        UserWarning, match="the graph that DDP cuts in buckets is compiled unchanged.*TypeError"
    ):
        torch.testing.assert_close(gradients(compiled, model, x), expected)


# Where parts begin


def sites(kind):
    found = [site.pattern for report in liger_compile.reports() for site in report.sites if site.kind == kind]
    return sorted(found)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_parts_begin_where_layers_do(process_group, dtype, monkeypatch):
    """So that in every part MLPs are whole, and as little is kept as of the whole graph."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=FEWEST_PARTS,
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    model = LlamaForCausalLM(config).to(dtype)
    ids = torch.randint(512, (2, 32))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    options = {"liger.inner": "aot_eager", "liger.strict": True}
    alone = torch.compile(model, backend="liger", options=options)
    alone(**inputs)
    expected, size = (sites("annotate"), sites("replace")), kept_bytes(model, alone, **inputs)
    torch._dynamo.reset()
    liger_compile.clear_reports()

    warned = []
    monkeypatch.setattr(torch._dynamo.backends.distributed.log, "warning", lambda *args: warned.append(args))
    ddp = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend="liger", options=options)
    ddp(**inputs).loss.backward()
    assert len(liger_compile.reports()) >= FEWEST_PARTS
    assert (sites("annotate"), sites("replace")) == expected
    assert warned == []
    assert kept_bytes(model, ddp, **inputs) == pytest.approx(size, rel=0.01)


class Hourglass(torch.nn.Module):
    """Little passes in one place alone, and that is not where gradients should wait for one another."""

    def __init__(self):
        super().__init__()
        before, after = ([torch.nn.Linear(512, 512) for _ in range(8)] for _ in range(2))
        self.layers = torch.nn.ModuleList([*before, torch.nn.Linear(512, 4), torch.nn.Linear(4, 512), *after])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def test_a_part_does_not_wait_for_a_place_that_is_far(process_group):
    torch.manual_seed(0)
    model, x = Hourglass(), torch.randn(BATCH, LENGTH, 512)
    expected = gradients(model, model, x)
    ddp = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend="liger", options=OPTIONS)
    torch.testing.assert_close(gradients(ddp, model, x), expected)
    assert FEWEST_PARTS // 2 <= len(liger_compile.reports()) <= FEWEST_PARTS
