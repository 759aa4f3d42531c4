"""The page of an explanation: what it has, and that a browser shows it."""

from __future__ import annotations

import html
import re
import shutil
import sys
import traceback
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_compile
from liger_compile.__main__ import main

WIDTH = 8
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
# The first three are what a browser in a container needs; with the others it asks for nothing from a network.
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Norm(nn.Module):
    def __init__(self, exponent=2):
        super().__init__()
        self.weight, self.exponent = nn.Parameter(torch.ones(WIDTH)), exponent

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(self.exponent).mean(-1, keepdim=True) + 1e-6))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, exponent=2):
        super().__init__()
        self.norm, self.mlp = Norm(exponent), MLP()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Three equal layers, and one whose norm has another exponent: <4>."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(), Layer(4), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Tags(HTMLParser):
    """The open elements at the end, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def explanation():
    return liger_compile.explain(Model(), torch.randn(4, WIDTH))


def text_of(page):
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return " ".join(" ".join(tags.text).split())


def test_equal_layers_are_one_row_and_others_rows_of_their_own(explanation):
    text = text_of(explanation.to_html())
    assert re.search(r"\{0\.\.1,3\}.* 3 equal", text)
    assert text.count("rms_norm.llama 3x") == 1 and "gated_mlp.swiglu 3x" in text
    assert "near miss" in text and "x.pow(self.exponent)" in text  # beside the line of source


def test_what_modules_keep_is_measured(explanation):
    """A SiLU keeps its input; a product keeps both factors, of which one is the result of the SiLU."""
    (graph,) = explanation.graphs
    kept = graph.kept_by_module
    of_value = 4 * WIDTH * 4
    assert kept["layers.0.mlp.gate"] == of_value  # its input, which `up` reads too
    assert kept["layers.0.mlp"] == 3 * of_value
    assert kept["layers.0.mlp.down"] == of_value
    assert kept["layers.1.norm"] == kept["layers.3.norm"] > kept["layers.0.norm"] > 0
    assert "kept_by_module" in graph.to_dict()
    with torch.no_grad():
        (graph,) = liger_compile.explain(Model(), torch.randn(4, WIDTH)).graphs
    assert graph.kept_by_module == {}


def test_compiled_graphs_measure_nothing():
    torch.compile(Model(), backend="liger", options={"liger.inner": "eager"})(torch.randn(4, WIDTH))
    (report,) = liger_compile.reports()
    assert report.kept_by_module is None
    frame = re.fullmatch('<iframe srcdoc="([^"]*)" [^>]*></iframe>', report._repr_html_())
    assert "gated_mlp.swiglu 3x" in text_of(html.unescape(frame[1]))


def test_a_graph_that_cannot_run_again_leaves_no_mode():
    """It raises where gradients are off and autocast is on."""

    def f(x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return torch.ops.liger_compile_tests_html.once(x * 2)

    found = liger_compile.explain(f, torch.randn(4, WIDTH, requires_grad=True))
    assert found.graphs[0].kept_by_module is None
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@torch.library.custom_op("liger_compile_tests_html::once", mutates_args=())
def once(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@once.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    if any(frame.name == "kept_by_module" for frame in traceback.extract_stack()):
        raise ValueError("on purpose")
    return torch.empty_like(x)


def test_sizes_that_are_symbolic_are_not_measured():
    x = torch.randn(4, WIDTH)
    torch._dynamo.mark_dynamic(x, 0)
    found = liger_compile.explain(Model(), x)
    assert found.graphs[0].kept_by_module is None and "less kept" not in text_of(found.to_html())


def test_text_of_users_is_escaped():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x if x.numel() > 1 < 2 else x

    page = liger_compile.explain(Odd(), torch.randn(4, WIDTH)).to_html()
    assert "&gt; 1 &lt; 2" in page and "> 1 < 2" not in page


def test_nothing_compiled():
    assert "No graph was compiled" in liger_compile.explain(lambda: 1).to_html()


def test_the_command_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "explained.py").write_text(
        "import torch\ndef factory(): return torch.tanh, (torch.ones(2),), {}\n"
    )
    assert main(["explain", "explained:factory", "--html", "page.html"]) == 0
    assert "whole graph" in text_of((tmp_path / "page.html").read_text())


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver")
def test_a_browser_opens_and_closes_it(explanation, tmp_path: Path):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    (tmp_path / "page.html").write_text(explanation.to_html())
    with webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER)) as browser:
        browser.get((tmp_path / "page.html").as_uri())
        near = browser.find_element("css selector", ".mark.near")
        assert near.is_displayed() and not near.find_element("tag name", "pre").is_displayed()
        near.find_element("tag name", "summary").click()
        assert "x.pow(self.exponent)" in near.find_element("tag name", "pre").text
        browser.find_element("css selector", 'button[data-kind="near"]').click()
        assert not near.is_displayed()
        browser.find_element("id", "all").click()  # all are open: it closes them
        assert not browser.find_element("css selector", ".mark").is_displayed()
        assert browser.get_log("browser") == []  # no error of its script
