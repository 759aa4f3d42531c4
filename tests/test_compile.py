"""Handing a graph on: every inner compiler gives eager's numbers; Inductor gets what a user asks of it."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.callback import callback_handler
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._subclasses import FakeTensor, FakeTensorMode

from liger_compile.compile import (
    BackwardPlan,
    cache_key,
    compile_graph,
    package_hash,
    set_up_dynamo,
    uses_cudagraphs,
)
from liger_compile.pattern import Pattern
from liger_compile.torch_internals.aot_autograd import cache_counts, why_not_cached
from liger_compile.torch_internals.dtensor import CALLED_NAMES
from liger_compile.torch_internals.inductor import free_cudagraphs


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(x, w):
    return F.silu(x @ w).pow(2).mean()


def inputs(rows=4):
    torch.manual_seed(0)
    return torch.randn(rows, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)


def loss_and_gradients(function, rows=4):
    arguments = inputs(rows)
    loss = function(*arguments)
    return loss.detach(), *torch.autograd.grad(loss, arguments)


def captured(function, *arguments):
    """The Dynamo graph of function(*arguments)."""
    graphs = []
    torch.compile(function, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)(*arguments)
    return graphs[0]


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_the_inner_compilers_agree_with_eager(inner):
    compiled = torch.compile(loss_of, backend=partial(compile_graph, inner=inner), fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled), loss_and_gradients(loss_of))


@pytest.mark.parametrize(
    ("device", "saves", "options", "expected"),
    [
        ("cuda", True, {}, False),
        ("cuda", True, {"allow_buffer_reuse": True}, True),
        ("cuda", False, {}, None),
        ("cpu", True, {}, None),
    ],
)
def test_buffers_of_a_gpu_are_freed_early(device, saves, options, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda gm, _, config_patches, decompositions: seen.append((config_patches, decompositions)),
    )
    with FakeTensorMode():
        arguments = [torch.empty(4, 8, device=device), torch.empty(8, 8, device=device)]
    compile_graph(
        captured(loss_of, *inputs()),
        arguments,
        inductor_options=options,
        backward=BackwardPlan() if saves else None,
    )
    ((patches, decompositions),) = seen
    assert patches.get("allow_buffer_reuse") is expected
    assert (decompositions is not None) == (device == "cuda" and saves)


@pytest.mark.xfail(
    (2, 12) <= torch.__version__ < (2, 13),
    reason="torch 2.12 keeps nothing where decompositions are given: the cache's key has a local function of torch's",
)
def test_the_caches_keep_what_is_compiled_for_a_gpu():
    from torch._inductor.utils import fresh_cache

    backend = partial(compile_graph, backward=BackwardPlan(everywhere=True))
    with fresh_cache():
        for hits in (0, 1):
            torch._dynamo.reset()
            before = cache_counts()["hit"]
            compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
            torch.testing.assert_close(loss_and_gradients(compiled), loss_and_gradients(loss_of))
            assert cache_counts()["hit"] == before + hits


def test_a_users_own_pass_stays(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda *_, config_patches, **__: seen.append(config_patches)
    )
    with FakeTensorMode():
        arguments = [torch.empty(4, 8, device="cuda")]

    def theirs(graph):
        pass

    options = {"post_grad_custom_post_pass": theirs}
    compile_graph(captured(loss_of, *inputs()), arguments, inductor_options=options, backward=BackwardPlan())
    passes = seen[0]["post_grad_custom_post_pass"]
    if hasattr(custom_graph_pass, "get_custom_graph_passes"):
        assert passes[0] is theirs and len(passes) == 2
    else:  # this torch takes one
        assert passes is theirs


def test_the_gradient_of_an_embedding_in_half_precision_stays_whole_on_a_gpu(monkeypatch):
    table, whole = [], torch.ops.aten.embedding_dense_backward.default
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda *_, decompositions, **__: table.append(decompositions)
    )
    monkeypatch.setattr(
        "torch._inductor.decomposition.select_decomp_table", lambda: {whole: lambda *_: "decomposed"}
    )
    monkeypatch.setattr(torch.ops.liger_compile.embedding_backward, "default", lambda *_: "ours")
    with FakeTensorMode():
        dy, ids = torch.empty(2, 3, 8, device="cuda"), torch.zeros(2, 3, dtype=torch.long, device="cuda")
    compile_graph(captured(loss_of, *inputs()), [dy], backward=BackwardPlan())
    rest = ids, 2**22, -1, False
    assert table[0][whole](dy.bfloat16(), *rest) == "ours"
    assert table[0][whole](dy.bfloat16(), ids, 2**20, -1, False) == "decomposed", "of a small table"
    assert table[0][whole](dy, *rest) == "decomposed", "there is no wider dtype"
    assert table[0][whole](torch.empty(2, 3, 8).bfloat16(), *rest) == "decomposed", "a CPU"


def test_the_op_of_an_embedding_gradient():
    dy, ids = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.tensor([[1, 1, 0], [4, 1, 3]])
    expected = torch.ops.aten.embedding_dense_backward.default(dy, ids, 5, 3, False)
    op = torch.ops.liger_compile.embedding_backward.default
    torch.testing.assert_close(op(dy, ids, 5, 3, False), expected, rtol=0, atol=0)
    torch.library.opcheck(op, (dy, ids, 5, 3, False))


@pytest.mark.gpu
def test_an_embedding_takes_no_wider_table():
    table = torch.randn(70000, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids = torch.randint(70000, (4, 64), device="cuda")
    compiled = torch.compile(
        lambda ids: torch.nn.functional.embedding(ids, table).sin().sum(), backend="liger"
    )
    (expected,) = torch.autograd.grad(torch.nn.functional.embedding(ids, table).sin().sum(), table)
    for _ in range(2):
        loss = compiled(ids)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (found,) = torch.autograd.grad(loss, table)
        taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.5 * table.nbytes  # the second time: the first, kernels are tuned
    torch.testing.assert_close(found, expected)


def test_mode_and_options_hold_for_forward_and_for_the_backward_compiled_later():
    seen = []

    def look(graph):
        config = inductor_config
        marked = config.unsafe_marked_cacheable_functions
        seen.append((config.triton.cudagraphs, config.max_fusion_size, *marked))

    options = {"post_grad_custom_post_pass": look, "max-fusion-size": 7}
    options["unsafe_marked_cacheable_functions"] = {"theirs": "1"}
    backend = partial(compile_graph, mode="reduce-overhead", inductor_options=options)
    loss_and_gradients(torch.compile(loss_of, backend=backend))
    assert seen == [(True, 7, "theirs", "liger_compile", *CALLED_NAMES)] * 2
    assert "liger_compile" not in inductor_config.unsafe_marked_cacheable_functions


def test_dynamic_sizes_compile_once():
    compilations = []

    def backend(gm, example_inputs):
        compilations.append(gm)
        return compile_graph(gm, example_inputs)

    compiled = torch.compile(loss_of, backend=backend, dynamic=True)
    for rows in (4, 6):
        arguments = [one.detach() for one in inputs(rows)]
        torch.testing.assert_close(compiled(*arguments), loss_of(*arguments))
    assert len(compilations) == 1


def test_compiled_autograd():
    expected = loss_and_gradients(loss_of)[1:]
    arguments = inputs()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss_of(*arguments).backward(), backend=compile_graph)()
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
    torch.testing.assert_close(tuple(one.grad for one in arguments), expected)


class TwoBuckets(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(2))  # 1 MiB each

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.sum()


def test_ddp_buckets_come_with_fake_inputs(process_group):
    inputs_of_buckets = []

    def backend(gm, example_inputs):
        inputs_of_buckets.append(example_inputs)
        return compile_graph(gm, example_inputs)

    model, x = TwoBuckets(), torch.ones(2, 512)
    expected = torch.autograd.grad(model(x), tuple(model.parameters()))
    ddp = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    torch.compile(ddp, backend=backend)(x).backward()
    torch.testing.assert_close(tuple(one.grad for one in model.parameters()), expected)
    assert len(inputs_of_buckets) == 2
    assert all(isinstance(one, FakeTensor) for bucket in inputs_of_buckets for one in bucket)


@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize("kwargs", [{"options": {"max_autotun": True}}, {"options": {"max_autotune": "yes"}}])
def test_a_wrong_inductor_option_raises_what_stock_raises(inner, kwargs):
    with pytest.raises(RuntimeError) as stock:
        torch.compile(loss_of, backend="inductor", **kwargs)
    gm = captured(loss_of, *inputs())
    with pytest.raises(RuntimeError) as ours:
        compile_graph(gm, inputs(), inductor_options=kwargs["options"], inner=inner)
    assert str(ours.value) == str(stock.value)


def test_a_wrong_mode_raises_what_stock_raises():
    with pytest.raises(RuntimeError, match="Unrecognized mode=fast, should be one of"):
        compile_graph(captured(loss_of, *inputs()), inputs(), mode="fast")


def test_uses_cudagraphs():
    assert uses_cudagraphs("reduce-overhead", None) and uses_cudagraphs(None, {"triton.cudagraphs": True})
    assert not uses_cudagraphs(None, None) and not uses_cudagraphs("max-autotune-no-cudagraphs", {})
    with inductor_config.patch({"triton.cudagraphs": True}):
        assert uses_cudagraphs(None, None) and not uses_cudagraphs(None, {"triton.cudagraphs": False})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reset_forgets_recorded_cuda_graphs():
    def run():
        arguments = [one.detach().cuda() for one in inputs()]
        compiled = torch.compile(loss_of, backend=partial(compile_graph, mode="reduce-overhead"))
        for _ in range(3):
            torch.testing.assert_close(compiled(*arguments).clone(), loss_of(*arguments))

    run()
    from torch._inductor.cudagraph_trees import get_container

    assert get_container(0).tree_manager is not None
    free_cudagraphs()
    assert get_container(0).tree_manager is None
    torch._dynamo.reset()
    run()


def test_reset_is_nothing_without_a_device():
    free_cudagraphs()


def test_marks_change_the_key_in_nested_graphs_too():
    def checkpointed(x, w):
        return torch.utils.checkpoint.checkpoint(loss_of, x, w, use_reentrant=False)

    gm = captured(checkpointed, *inputs())
    bodies = [one for one in gm.modules() if isinstance(one, torch.fx.GraphModule)]
    assert len(bodies) == 2
    keys = {cache_key(gm)}
    for body in bodies:
        nodes = [node for node in body.graph.nodes if node.op != "placeholder"]
        nodes[0].meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_RECOMPUTE
        keys.add(cache_key(gm))
        nodes[0].meta["ac_graph_id"] = 7
        keys.add(cache_key(gm))
    assert len(keys) == 5


def test_the_source_of_patterns_and_of_a_users_ops_changes_the_key(tmp_path):
    def module(factor):
        path = tmp_path / f"factor_{factor}.py"
        path.write_text(f"import torch\n\ndef search(x):\n    return x * {factor}\n")
        scope = {}
        exec(compile(path.read_text(), path, "exec"), scope)
        return scope["search"]

    def typed(factor):  # a notebook: no file
        scope = {}
        exec(f"def search(x):\n    return [x * {factor} for _ in x]", scope)
        return scope["search"]

    def key(function):
        pattern = Pattern("scale.mine", search=function, replace=partial(torch.relu), examples={})
        return cache_key(gm, [pattern])

    gm = captured(lambda x: x.sin(), torch.ones(2))
    assert len({key(module(2)), key(module(3)), key(typed(2)), key(typed(3)), cache_key(gm)}) == 5
    assert key(module(2)) == key(module(2)) and key(typed(2)) == key(typed(2))

    op = torch.library.custom_op(
        "test_compile::scale", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_fake(lambda x: torch.empty_like(x))
    with_op = captured(lambda x: torch.ops.test_compile.scale(x), torch.ones(2))
    before = cache_key(with_op)
    op.register_autograd(typed(3))
    assert cache_key(with_op) != before


def test_why_not_cached():
    assert why_not_cached(captured(loss_of, *inputs())) is None
    gm = captured(lambda x: x.sin().cos(), torch.ones(2))
    del gm.graph.find_nodes(op="call_method", target="sin")[0].meta["example_value"]
    assert "Unsupported call_method target" in why_not_cached(gm)


def test_the_package_hash_covers_the_patterns_and_is_taken_once():
    assert len(package_hash()) == 64
    assert package_hash() is package_hash()


@pytest.fixture(scope="module")
def graphs_of_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.zeros(1, 4, dtype=torch.long)

    def count():
        graphs = []
        torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward)(ids, labels=ids)
        return len(graphs)

    return count


class TestSetUpDynamo:
    """transformers logs a warning between the logits and the loss of GPT-2."""

    @pytest.fixture(autouse=True)
    def nothing_ignored(self):
        with torch._dynamo.config.patch(ignore_logging_functions=set()):
            yield

    def test_without_it_loss_is_in_another_graph_than_the_logits(self, graphs_of_gpt2):
        assert graphs_of_gpt2() == 2

    def test_with_it_there_is_one_graph(self, graphs_of_gpt2):
        set_up_dynamo()
        assert graphs_of_gpt2() == 1

    def test_transformers_may_be_imported_later(self, graphs_of_gpt2, monkeypatch):
        with monkeypatch.context() as not_yet:
            not_yet.delattr(logging.Logger, "warning_once")
            set_up_dynamo()
        assert graphs_of_gpt2() == 1

    def test_twice_is_as_good_as_once(self):
        set_up_dynamo()
        before = len(callback_handler.start_callbacks)
        set_up_dynamo()
        assert len(callback_handler.start_callbacks) == before
