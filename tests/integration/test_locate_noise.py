"""Localisation: a wrong weight in one layer of an otherwise right rewrite is named."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import bda_fx
from tests import models
from tests.models import Case, Example

# So small a budget has no room for K and V on one basis, where one weight would hold both.
FULL = {"basis": "pivot", "basis_size": "full", "noise_budget": 1.1}


def rewritten(example: Example) -> ExportedProgram:
    return bda_fx.rewrite(example.model, (), example.kwargs, options=FULL).program


def spoil(program: ExportedProgram, name: str) -> None:
    """The largest number of a weight is off by five per cent."""
    weight = program.state_dict[name].data.flatten()
    weight[weight.abs().argmax()] *= 1.05


def verify(example: Example, candidate: object, **more: object) -> bda_fx.Fidelity:
    return bda_fx.verify(example.model, candidate, (), example.kwargs, **more)  # type: ignore[arg-type]


BERT = "encoder.layer.{k}.attention"
GPT2 = "h.{k}.attn"
LATENT = "layers.{k}.self_attn"


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize(
    ("case", "weight", "module", "product"),
    [
        # In an eager attention the scores are seen, so QK and VO are told apart.
        (Case("bert", "eager"), f"{BERT}.self.key.weight_coefficients",
         f"{BERT}.self scores", f"qk {BERT}.self.key.weight"),
        (Case("bert", "eager"), f"{BERT}.self.query.weight",
         f"{BERT}.self scores", f"qk {BERT}.self.key.weight"),
        (Case("bert", "eager"), f"{BERT}.self.value.weight_coefficients",
         f"{BERT}.output.dense", f"vo {BERT}.self.value.weight"),
        (Case("bert", "sdpa"), f"{BERT}.self.key.weight_coefficients",
         f"{BERT}.output.dense", f"qk {BERT}.self.key.weight"),
        (Case("bert", "sdpa"), f"{BERT}.output.dense.weight",
         f"{BERT}.output.dense", f"vo {BERT}.self.value.weight"),
        # A fused projection that is spelled as addmm.
        (Case("gpt2", "eager"), f"{GPT2}.c_attn.weight_coefficients1",
         f"{GPT2} scores", f"qk {GPT2}.c_attn.weight"),
        # Latents come in basis order, so what the layer norm before makes is not compared.
        (Case("deepseek_v2", "sdpa"), f"{LATENT}.kv_b_proj.weight_coefficients",
         f"{LATENT}.o_proj", f"vo {LATENT}.kv_b_proj.weight"),
        (Case("llama", "sdpa"), f"{LATENT}.v_proj.weight_coefficients",
         f"{LATENT}.o_proj", f"vo {LATENT}.v_proj.weight"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_weight_is_found_in_its_layer(
    case: Case, weight: str, module: str, product: str, k: int
) -> None:
    example = models.make(case)
    program = rewritten(example)
    spoil(program, weight.format(k=k))
    fidelity = verify(example, program)
    assert not fidelity.passed
    jump = fidelity.first_jump
    assert jump is not None
    assert jump.module == module.format(k=k)
    assert product.format(k=k) in jump.products
    assert f"first beyond the budget: {jump.module} (ratio " in str(fidelity)
    assert f"**{jump.noise_ratio:.2f}**" in fidelity.to_markdown()


@pytest.mark.parametrize(
    "architecture", ["bert", "gpt2", "t5", "albert", "deepseek_v2", "whisper", "clip", "encoder"]
)
def test_a_right_rewrite_is_within_the_budget_everywhere(architecture: str) -> None:
    """Tensors in another basis are off by 100 % and are left out: none is mistaken for noise."""
    example = models.make(Case(architecture, "sdpa"))
    result = bda_fx.rewrite(example.model, (), example.kwargs, options=FULL)
    fidelity = verify(example, result.program, localize=True)
    assert fidelity.layers
    assert fidelity.first_jump is None
    shown = [product for layer in fidelity.layers for product in layer.products]
    assert sorted(shown) == sorted(f"{s.product} {s.name}" for s in result.report.rewritten)


def test_a_program_that_was_saved() -> None:
    example = models.make(Case("bert", "sdpa"))
    program = rewritten(example)
    spoil(program, "encoder.layer.1.attention.self.value.weight_coefficients")
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    jump = verify(example, torch.export.load(file)).first_jump
    assert jump is not None
    assert jump.module == "encoder.layer.1.attention.output.dense"


def test_a_module_that_is_wrong_elsewhere() -> None:
    """Any model whose modules have the same paths: here, one trained on in a feed-forward layer."""
    example = models.make(Case("bert", "sdpa"))
    moved = copy.deepcopy(example.model)
    with torch.no_grad():
        moved.encoder.layer[1].intermediate.dense.weight[3, 5] += 0.1
    fidelity = verify(example, moved)
    jump = fidelity.first_jump
    assert jump is not None
    assert jump.module == "encoder.layer.1.intermediate.dense"
    assert jump.products == ()


def test_a_shared_module_is_told_apart_by_its_calls() -> None:
    example = models.make(Case("albert", "sdpa"))
    layers = verify(example, rewritten(example), localize=True).layers
    assert layers is not None
    names = [layer.module for layer in layers]
    first = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    assert {first, f"{first}@1", f"{first}@2"} <= set(names)
    assert len(set(names)) == len(names)


def test_padding_is_left_out_of_layers_too() -> None:
    example = models.make(Case("bert", "sdpa"))
    kwargs = dict(example.kwargs)
    mask = torch.ones_like(kwargs["input_ids"])
    mask[:, -2:] = 0
    kwargs["attention_mask"] = mask

    def spoilt(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return torch.where(mask[..., None].bool(), output, output.flip(-1))

    candidate = copy.deepcopy(example.model)
    candidate.encoder.layer[0].output.dense.register_forward_hook(spoilt)
    given = {"mask": "attention_mask", "localize": True}
    fidelity = bda_fx.verify(example.model, candidate, (), kwargs, **given)
    assert fidelity.passed, str(fidelity)
    assert fidelity.first_jump is None
    assert not bda_fx.verify(example.model, candidate, (), kwargs).passed


class Flat(nn.Module):
    """Another make of the same function."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.5 * torch.sin(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Flat()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)


def test_why_there_are_no_layers() -> None:
    fidelity = bda_fx.verify(Nested(), Flat(), (X,), localize=True)
    assert fidelity.layers is None
    wanted = "no module of the reference gives what one of the candidate does"
    assert fidelity.layers_reason == wanted
    compiled = torch.compile(Flat(), backend="eager")
    fidelity = bda_fx.verify(Flat(), compiled, (X,), localize=True)
    wanted = "the candidate is compiled: only exported programs show their modules"
    assert fidelity.layers_reason == wanted
    fidelity = bda_fx.verify(Flat(), lambda x: torch.sin(x), (X,))
    wanted = "the candidate is a function: only exported programs show their modules"
    assert fidelity.layers_reason == wanted
    assert f"not localised: {wanted}" in str(fidelity)
    assert bda_fx.verify(Flat(), Flat(), (X,)).layers_reason == (
        "it passed: localize=True looks into it all the same"
    )
    assert bda_fx.verify(Flat(), Flat(), (X,), localize=False).layers_reason == "localize=False"
