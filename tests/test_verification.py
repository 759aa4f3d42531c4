"""verify(): a model that is right, and planted faults, which it has to name."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile
from liger_compile import Pattern, unregister_pattern, verify
from liger_compile.__main__ import main

NORM = {"x": torch.empty(2, 4), "weight": torch.empty(4)}


def norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Model(nn.Module):
    """Loss and logits; a buffer that counts calls."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.first, self.second = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids, labels=None):
        self.calls += 1
        h = norm(torch.tanh(norm(self.embed(ids), self.first)), self.second)
        logits = self.head(h)
        return {"loss": F.cross_entropy(logits.view(-1, 40), labels.view(-1)), "logits": logits}


IDS = torch.arange(16).view(2, 8)
AOT = {"liger.inner": "aot_eager", "liger.policy": "always"}


@pytest.mark.parametrize("options", [AOT, None], ids=["aot_eager", "as users run it"])
def test_a_right_model(options):
    model = Model()
    found = verify(model, IDS, labels=IDS, options=options)
    assert found and found.is_right and found.culprits == () and found.fuel is None
    names = [row.name for row in found.rows]
    assert {"output['loss']", "output['logits']", "gradient of head.weight", "calls after the step"} <= {
        *names
    }
    assert sum(report.count("replace") for report in found.reports) >= 1
    # The model is as it was.
    assert model.calls == 0 and model.head.weight.grad is None
    text = str(found)
    assert text.startswith("liger_compile verify: right; ") and "WRONG" not in text
    json.dumps(found.to_dict())


def wrong(search, replace, **more):
    return Pattern("planted.wrong", search, replace, examples=NORM, **more)


@pytest.mark.parametrize(
    "replace",
    [
        lambda x, weight: norm(x, weight) * 1.001,
        lambda x, weight: norm(x.detach(), weight),
        lambda x, weight: norm(x, weight.detach()),
    ],
    ids=["value", "gradient of x", "no gradient of weight"],
)
def test_a_planted_fault_is_named(replace):
    found = verify(Model(), IDS, labels=IDS, options={**AOT, "liger.patterns": (wrong(norm, replace),)})
    assert not found
    assert [site.pattern for site in found.culprits] == ["planted.wrong"]
    text = str(found)
    assert "WRONG" in text and "planted.wrong" in text and 'options={"liger.skip"' in text


def test_the_first_wrong_site_is_named():
    pattern = wrong(
        norm,
        lambda x, weight: norm(x, weight) * 1.001,
        check=lambda match: None if "second" in str(match.captures["weight"].node) else "not this one",
    )
    found = verify(Model(), IDS, labels=IDS, options={**AOT, "liger.patterns": (pattern,)})
    (culprit,) = found.culprits
    assert culprit.pattern == "planted.wrong" and found.fuel >= 1
    assert liger_compile.verify(
        Model(), IDS, labels=IDS, options={**AOT, "liger.patterns": (pattern,), "liger.fuel": found.fuel - 1}
    )


def test_a_model_that_does_not_run_in_float64():
    def only_float32(x, w):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return torch.tanh(x) * w

    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    found = verify(only_float32, x, w, options=AOT)
    assert found and "float32 only" in found.reference

    planted = Pattern(
        "planted.tanh",
        lambda x: torch.tanh(x),
        lambda x: torch.tanh(x) * 1.001,
        examples={"x": torch.empty(2, 4)},
    )
    assert not verify(only_float32, x, w, options={**AOT, "liger.patterns": (planted,)})


def test_what_is_compiled_already_is_refused():
    with pytest.raises(TypeError, match="pass the model itself"):
        verify(torch.compile(Model()), IDS, labels=IDS)


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from liger_compile import Pattern, register_pattern\n"
        "def step(x): return torch.tanh(x).sum()\n"
        "def right(): return step, {'x': torch.ones(3, requires_grad=True)}\n"
        "def wrong():\n"
        "    register_pattern(Pattern('planted.tanh', lambda x: torch.tanh(x), lambda x: torch.tanh(x) * 1.01,\n"
        "                             examples={'x': torch.empty(2)}))\n"
        "    return right()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    try:
        assert main(["verify", "mine:right"]) == 0
        assert "verify: right" in capsys.readouterr().out
        assert main(["verify", "mine:wrong"]) == 1
        assert "planted.tanh" in capsys.readouterr().out
    finally:
        unregister_pattern("planted.tanh")
        del sys.modules["mine"]
