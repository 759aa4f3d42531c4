"""A variant of a case of bench.families, in the process that is its own: what bench.families starts.

    python -m bench.family_step CASE VARIANT DEVICE [--compiler NAME] [--tiny]

It answers in lines of JSON: first by itself, then to each line that it reads: `again` (another try at the first step),
`settle` or a number of steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.common import Row
from bench.family_table import BY_NAME, Case
from bench.turns import Turns, one_of_few, suppressing_out_of_memory

AGAIN, SETTLE = "again", "settle"
INDUCTOR, INDUCTOR_AGAIN, OURS = "inductor", "inductor-again", "liger-compile"
LIGER_KERNEL, LIGER_KERNEL_EAGER = "liger-kernel", "liger-kernel-eager"


@dataclass(frozen=True)
class Variant:
    """`compile`: arguments of torch.compile, or None; `patched`: by liger-kernel."""

    compile: Mapping[str, Any] | None
    patched: bool = False


VARIANTS: Mapping[str, Variant] = {
    INDUCTOR: Variant({}),
    INDUCTOR_AGAIN: Variant({}),
    LIGER_KERNEL: Variant({}, patched=True),
    LIGER_KERNEL_EAGER: Variant(None, patched=True),
    OURS: Variant({"backend": "liger"}),
}


def variant_of(name: str) -> Variant:
    """The variant of a name: one of VARIANTS, or ours with options, as in `liger-compile:outline=auto:skip=rotary+mlp`.

    Raises LookupError if there is no such variant.
    """
    base, *options = name.split(":")
    if options and base == OURS:
        named = dict(option.split("=", 1) for option in options)
        values = {
            f"liger.{key}": tuple(text.split("+")) if key == "skip" else text for key, text in named.items()
        }
        return Variant({"backend": "liger", "options": values})
    if name not in VARIANTS:
        raise LookupError(f"expected one of {', '.join(VARIANTS)}, or {OURS}:OPTION=VALUE, got {name}")
    return VARIANTS[name]


class FamilyStep(Turns):
    """A step of a case. Raises LookupError or ImportError where the variant does not exist for it."""

    def __init__(self, case: Case, variant: Variant, device: str, compiler: str, tiny: bool) -> None:
        self._case, self._variant, self.device = case, variant, torch.device(device)
        self._compiler = compiler
        config = case.config_of(tiny)
        self._patch = _patch_of(config.model_type) if variant.patched else None
        self.model = case.build(config, self.device)
        self._inputs = case.inputs(config, self.device, tiny)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=case.scaler)
        self._function: Callable[..., Any] = self.model
        self.eager_loss: float | None = None
        self.clear()
        self._reserved = self._reserved_bytes()

    def first(self) -> Row:
        """The first step's loss and seconds, beside the loss of eager code; an error if the two disagree.

        Where others have taken the memory, the answer is AGAIN.
        """
        with suppressing_out_of_memory():
            if self.eager_loss is None:
                with one_of_few(), torch.no_grad():  # more eager steps at once could need all the memory
                    self.eager_loss = self._forward().loss.item()
                    self.clear()
                self._compile()
            begin = time.perf_counter()
            loss = self.run()
            seconds = time.perf_counter() - begin
            self.clear()
            return self._agreeing(loss, self.eager_loss, seconds)
        self.clear()
        return {AGAIN: "out of memory"}

    def settled(self) -> Row:
        """What is constant from step to step, in the columns of the CSV, and `step_s`."""
        import liger_compile

        found = self.settle()
        launch = self.launch_ms()
        peak, scale = found["peak"], self._scaler.get_scale() if self._case.scaler else 1
        return {
            "step_s": found["step_s"],
            "grad_norm": round(found["grad_norm"] / scale, 5),
            "launch_ms": "" if launch == "" else round(launch, 3),
            "peak_mib": "" if peak == "" else round(peak / 2**20, 1),
            "replaced": sum(report.count("replace") for report in liger_compile.reports()),
        }

    def peak(self) -> int | str:
        """As of any step; with CUDA graphs, what is reserved, for a replay allocates nothing."""
        has_graphs = self._case.mode == "reduce-overhead" and self._variant.compile is not None
        if self.device.type == "cuda" and has_graphs:
            self.clear()
            return self._reserved_bytes() - self._reserved
        return super().peak()

    def run_marked(self, mark: Callable[[], Any]) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        mark()
        outputs = self._forward()
        mark()
        if self._case.is_trained:
            self._scaler.scale(outputs.loss).backward()
        mark()
        return outputs.loss.detach()

    def _forward(self) -> Any:
        autocast = self._case.autocast
        with contextlib.ExitStack() as modes:
            if not self._case.is_trained:
                modes.enter_context(torch.no_grad())
            if autocast is not None:
                modes.enter_context(torch.autocast(self.device.type, autocast))
            outputs = self._function(**self._inputs)
            if self._case.reads_logits:
                outputs.logits.argmax(-1)
        return outputs

    def _compile(self) -> None:
        if self._patch is not None:
            self._patch(self.model)
        if self._variant.compile is not None:
            arguments = _arguments(self._variant.compile, self._compiler, self._case.mode)
            self._function = torch.compile(self.model, **arguments)

    def _agreeing(self, loss: float, eager_loss: float, seconds: float) -> Row:
        found: Row = {
            "loss": round(loss, 5),
            "eager_loss": round(eager_loss, 5),
            "first_s": round(seconds, 1),
        }
        if not abs(loss - eager_loss) <= self._case.tolerance * abs(eager_loss):  # a loss may be no number
            found["error"] = f"not timed: expected the loss of eager code, {eager_loss:.5f}, got {loss:.5f}"
        return found

    def _reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved() if self.device.type == "cuda" else 0


def _arguments(compile: Mapping[str, Any], compiler: str, mode: str | None) -> dict[str, Any]:
    """The arguments of torch.compile; with another compiler than Inductor, without a mode, which is Inductor's."""
    if compiler == INDUCTOR:
        return {**compile, **({} if mode is None else {"mode": mode})}
    own = {"options": {**compile.get("options", {}), "liger.inner": compiler}}
    return {**compile, **own} if compile else {"backend": compiler}


def _patch_of(model_type: str) -> Callable[[Any], None]:
    """What liger-kernel does to a model of that type. Raises ImportError, or LookupError if there is no such thing."""
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ImportError(f"liger-kernel cannot be imported: {error}") from error
    if model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise LookupError(f"liger-kernel has no patch for {model_type}")

    def patch(model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        monkey_patch._apply_liger_kernel_to_instance(model=base)

    return patch


def serve(step: FamilyStep) -> None:
    _say(step.first())
    for line in sys.stdin:
        command = line.strip()
        asked = {AGAIN: step.first, SETTLE: step.settled}
        _say(asked[command]() if command in asked else step.turn(int(command)))


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.family_step")
    parser.add_argument("case", choices=BY_NAME)
    parser.add_argument(
        "variant", type=variant_of, help=f"one of {', '.join(VARIANTS)}, or {OURS}:OPTION=VALUE"
    )
    parser.add_argument("device")
    parser.add_argument("--compiler", default=INDUCTOR)
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    try:
        case = BY_NAME[chosen.case]
        serve(FamilyStep(case, chosen.variant, chosen.device, chosen.compiler, chosen.tiny))
    except (Exception, SystemExit) as error:
        first, *_ = str(error).strip().splitlines() or [""]
        _say({"error": f"{type(error).__name__}: {first}"[:300]})
        raise


def _say(row: Row) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
