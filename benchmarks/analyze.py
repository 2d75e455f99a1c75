"""Time what ``bda_fx.analyze`` takes after export: per step, per layer, and on a model of 671 B.

    python benchmarks/analyze.py [--quick]

* BERT-base (random weights, batch 2 × 16 tokens), 2 to 48 layers: seconds per pipeline step, and
  how many bases were sought per site: more where the budget does not allow r = D everywhere.
* One layer of Llama-3-8B's shape on the meta device, exported for 32 to 2048 tokens: labels are
  carried by every element, so sites are found in time that grows with the sizes exported for.
* DeepSeek-V3 with all its 61 layers on the meta device (bfloat16, 1 × 8 tokens): seconds and peak
  memory of a process of its own, from building the model to the report.

Writes results/analyze.json and results/analyze.md beside this script; with ``--quick`` (2 and 4
layers of each) it only prints.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import record
import torch
from step_times import step_times
from torch.export import ExportedProgram

import bda_fx
from bda_fx.passes.choose_basis import BasisSearch

SEED = 0
TOKENS = (32, 128, 512, 2048)
QUICK_TOKENS = (32,)
LAYERS = (2, 4, 8, 12, 24, 48)
QUICK_LAYERS = (2, 4)
REPEATS = 3
V3_LAYERS = 61


def export(model: torch.nn.Module, input_ids: torch.Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model.eval(), (), {"input_ids": input_ids}, strict=False)


def steps_of(program: ExportedProgram) -> tuple[bda_fx.Report, dict[str, float]]:
    """The report, and seconds per pipeline step and in total."""
    return step_times(lambda: bda_fx.analyze(program))


def bert(layers: int, repeats: int) -> dict[str, Any]:
    """Medians of seconds per step for BERT-base with that many layers."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(SEED)
    start = time.perf_counter()
    program = export(BertModel(BertConfig(num_hidden_layers=layers)), torch.arange(32).view(2, 16))
    exported = time.perf_counter() - start
    find_rows, sought = BasisSearch.rows, []

    def counted(search: BasisSearch, size: int) -> torch.Tensor:
        sought.append(size)
        return find_rows(search, size)

    with mock.patch.object(BasisSearch, "rows", counted):
        report, first = steps_of(program)
    runs = [first, *(steps_of(program)[1] for _ in range(repeats - 1))]
    assert len(report.sites) == 2 * layers
    return {
        "layers": layers,
        "nodes": len(program.graph.nodes),
        "build_and_export_s": exported,
        "rewritten": len(report.rewritten),
        "bases_per_site": len(sought) / len(report.sites),
        "steps_s": {name: statistics.median(run[name] for run in runs) for name in first},
    }


def llama(tokens: int) -> dict[str, Any]:
    """Seconds of the process that finding the sites of one layer of Llama-3-8B takes."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        program = export(LlamaModel(config), torch.zeros(1, tokens, dtype=torch.long))
    _, steps = steps_of(program)
    return {"tokens": tokens, "find_sites_s": steps["find sites"]}


def deepseek_v3(layers: int) -> dict[str, Any]:
    """Seconds per step and peak memory of this process for DeepSeek-V3 on the meta device."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    start = time.perf_counter()
    config = DeepseekV3Config(num_hidden_layers=layers, use_cache=False)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
        program = export(model, torch.zeros(1, 8, dtype=torch.long))
    exported = time.perf_counter() - start
    report, steps = steps_of(program)
    return {
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(program.graph.nodes),
        "products": len(report.sites),
        "reasons": sorted({site.reason_code for site in report.skipped if site.reason_code}),
        "build_and_export_s": exported,
        "steps_s": steps,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def in_a_process_of_its_own(layers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--deepseek-v3", str(layers)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def table(
    berts: list[dict[str, Any]],
    llamas: list[dict[str, Any]],
    v3: dict[str, Any],
    origin: dict[str, Any],
) -> str:
    names = [name for name in berts[0]["steps_s"] if not name.startswith("total")]
    lines = [
        record.heading("analyze.py", origin),
        "",
        "BERT-base after export, seconds (medians):",
        "",
        f"| layers | {' | '.join(names)} | total | CPU | total per layer | bases per site |",
        "|---" * (len(names) + 5) + "|",
    ]
    for row in berts:
        steps = row["steps_s"]
        cells = [f"{steps[name]:.3f}" for name in names]
        lines.append(
            f"| {row['layers']} | {' | '.join(cells)} | {steps['total']:.2f} "
            f"| {steps['total, CPU']:.2f} | {steps['total'] / row['layers']:.3f} "
            f"| {row['bases_per_site']:.2f} |"
        )
    lines += [
        "",
        "Finding the sites of one layer of Llama-3-8B's shape, by the tokens it is exported for:",
        "",
        f"| tokens | {' | '.join(str(row['tokens']) for row in llamas)} |",
        "|---" * (len(llamas) + 1) + "|",
        f"| seconds | {' | '.join(format(row['find_sites_s'], '.2f') for row in llamas)} |",
    ]
    steps = v3["steps_s"]
    taken = [name for name in names if name in steps]
    size = f"{v3['layers']} layers, {v3['parameters'] / 1e9:.0f} B parameters"
    lines += [
        "",
        f"DeepSeek-V3 on the meta device, {size}, {v3['nodes']} nodes, {v3['products']} attention",
        "products, seconds in a process of its own:",
        "",
        f"| build and export | {' | '.join(taken)} | analyze | CPU | peak memory |",
        "|---" * (len(taken) + 4) + "|",
        f"| {v3['build_and_export_s']:.1f} | {' | '.join(f'{steps[n]:.1f}' for n in taken)} "
        f"| {steps['total']:.1f} | {steps['total, CPU']:.1f} | {v3['peak_gib']:.1f} GiB |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few layers, once, no results written")
    parser.add_argument("--deepseek-v3", type=int, metavar="LAYERS", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.deepseek_v3:
        print(json.dumps(deepseek_v3(chosen.deepseek_v3)))
        return
    layers = QUICK_LAYERS if chosen.quick else LAYERS
    # First, as a child's peak memory begins at what its parent has.
    v3 = in_a_process_of_its_own(QUICK_LAYERS[-1] if chosen.quick else V3_LAYERS)
    bert(1, 1)  # imports and thread pools
    berts = [bert(n, 1 if chosen.quick else REPEATS) for n in layers]
    llamas = [llama(n) for n in (QUICK_TOKENS if chosen.quick else TOKENS)]
    origin = record.provenance(SEED, ("transformers",))
    found = {"bert_base": berts, "llama_layer_by_tokens": llamas, "deepseek_v3_on_meta": v3}
    text = table(berts, llamas, v3, origin)
    record.write("analyze", text, {**origin, **found}, quick=chosen.quick)


if __name__ == "__main__":
    main()
