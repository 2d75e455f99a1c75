"""What the commands of ``bda-fx`` do with good input."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bda_fx
from bda_fx.cli.errors import MEANINGS, ExitCode
from tests.cli.conftest import HEADS, HIDDEN, LAYERS, Cli, change_config, files
from tests.programs import Attention, example

SITES = 2 * LAYERS


def test_help_lists_commands_and_exit_codes(cli: Cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    for command in ("inspect", "rewrite", "export", "verify", "bench", "doctor"):
        assert command in ran.out
    words = " ".join(ran.out.split())
    for code, meaning in MEANINGS.items():
        assert f"{int(code)} {meaning}" in words
    assert "--install-completion" in ran.out


def test_the_version(cli: Cli) -> None:
    assert cli("--version").out == f"bda-fx {bda_fx.__version__}\n"


# -- inspect ------------------------------------------------------------------------------------


def test_inspect_plans_every_layer(cli: Cli, bert: Path) -> None:
    ran = cli("inspect", bert, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["rewritten"] == SITES
    before = sum(site["params_before"] for site in ran.data["sites"])
    after = sum(site["params_after"] for site in ran.data["sites"])
    assert ran.data["could_save_params"] == before - after > 0


def test_inspect_shows_a_table(cli: Cli, bert: Path) -> None:
    ran = cli("inspect", bert)
    assert ran.code == 0, ran.err
    assert "encoder.layer.1.attention.self.value.weight" in ran.out
    assert f"{HEADS} × {HIDDEN // HEADS}" in ran.out


@pytest.mark.parametrize("weights", [False, True])
def test_inspect_makes_do_with_a_config(
    cli: Cli, bert: Path, tmp_path: Path, weights: bool
) -> None:
    if weights:
        ran = cli("inspect", bert, "--config-only", "--json")
    else:
        shutil.copy(bert / "config.json", tmp_path)
        ran = cli("inspect", tmp_path / "config.json", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.data["sites"]) == SITES
    head = HIDDEN // HEADS
    assert ran.data["could_save_params"] == SITES * HEADS * head * head


def test_a_budget_changes_the_plan(cli: Cli, bert: Path) -> None:
    tight, loose = (
        cli("inspect", bert, "--json", "--noise-budget", budget).data["could_save_params"]
        for budget in (1.02, 3.0)
    )
    assert tight < loose


def test_text_to_calibrate_on(cli: Cli, bert: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the fox jumps over a dog\n\nthe dog\na fox\nthe fox\n")
    ran = cli("inspect", bert, "--json", "--calibration", text)
    assert ran.code == 0, ran.err
    assert ran.data["noise_ratio"] is not None
    text.write_text("\n")
    assert cli("inspect", bert, "--calibration", text).code == ExitCode.USAGE


# -- rewrite and verify -------------------------------------------------------------------------


def test_rewrite_writes_a_program_that_needs_no_bda_fx(
    cli: Cli, bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.pt2"
    ran = cli("rewrite", bert, "-o", out, "--json")
    assert ran.code == 0, ran.err
    assert files(tmp_path) == {"out.pt2", "out.pt2.bda.json", "out.pt2.bda.md"}
    assert json.loads((tmp_path / "out.pt2.bda.json").read_text())["target"] == "program"
    assert ran.data["report"]["rewritten"] == SITES
    assert ran.data["file_bytes"] == out.stat().st_size
    names = {str(size) for shape in ran.data["details"]["inputs"].values() for size in shape}
    assert len(names) == 2  # batch and length, each the same in every input
    ids = torch.arange(30).view(3, 10)
    program = torch.export.load(out)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got = program.module()(**inputs, token_type_ids=torch.zeros_like(ids))
    assert got[0].shape == (3, 10, HIDDEN)


def test_force_replaces_an_output(cli: Cli, rewritten: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt2"
    out.write_text("worthless")
    ran = cli("rewrite", rewritten, "-o", out, "--force")
    assert ran.code == 0, ran.err
    assert out.stat().st_size > 1000


def test_verify_finds_a_rewrite_equivalent(cli: Cli, bert: Path, rewritten: Path) -> None:
    ran = cli("verify", bert, rewritten, "--budget", 2, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["passed"]
    assert ran.data["inputs_are_real"]
    assert ran.data["num_inputs"] > 1
    assert 0 < ran.data["noise_ratio"] <= 2


def test_verify_finds_another_model_different(
    cli: Cli, bert: Path, rewritten: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(bert, tmp_path / "other"))
    change_config(other, hidden_act="relu")
    ran = cli("verify", rewritten, other)
    assert ran.code == ExitCode.DIFFERENT
    assert "NOT EQUIVALENT" in ran.out


def test_verify_finds_another_dtype_different(cli: Cli, bert: Path, rewritten: Path) -> None:
    ran = cli("verify", bert, rewritten, "--dtype", "float16")
    assert ran.code == ExitCode.USAGE  # a program has the dtype that it has
    assert "--dtype does not apply" in ran.err


# -- other models -------------------------------------------------------------------------------


def attention() -> tuple[nn.Module, tuple[Any, ...]]:
    return Attention(), (example(),)


def test_a_factory(cli: Cli, tmp_path: Path) -> None:
    name, out = f"{__name__}:attention", tmp_path / "out.pt2"
    assert cli("rewrite", name, "-o", out, "--noise-budget", 3).code == 0
    ran = cli("verify", name, out, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["inputs_are_real"]


def test_inputs_from_a_file(cli: Cli, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"x": example(seed=1)}, tmp_path / "inputs.safetensors")
    save_file({"y": example(seed=1)}, tmp_path / "wrong.safetensors")
    name = f"{__name__}:attention"
    ran = cli("inspect", name, "--inputs", tmp_path / "inputs.safetensors", "--json")
    assert ran.code == 0, ran.err
    ran = cli("inspect", name, "--inputs", tmp_path / "wrong.safetensors")
    assert ran.code == ExitCode.USAGE
    assert "y is no input of the model" in ran.err


def test_a_trusted_pickle(cli: Cli, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"x": example()}, tmp_path / "inputs.safetensors")
    torch.save(Attention(), tmp_path / "model.pt")
    arguments = (tmp_path / "model.pt", "--inputs", tmp_path / "inputs.safetensors", "--json")
    assert cli("inspect", *arguments).code == ExitCode.CANNOT_OPEN
    ran = cli("inspect", *arguments, "--unsafe")
    assert ran.code == 0, ran.err
    assert len(ran.data["sites"]) == 2


def test_a_timm_model_with_local_weights(cli: Cli, tmp_path: Path) -> None:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    save_file = pytest.importorskip("safetensors.torch").save_file
    from tests.zoo import torchvision_stand_in

    torchvision_stand_in.install()
    try:
        import timm

        model = timm.create_model("test_vit", pretrained=False)
        save_file(model.state_dict(), tmp_path / "vit.safetensors")
        weights = ("--weights", tmp_path / "vit.safetensors")
        ran = cli("inspect", "timm:test_vit", *weights, "--json")
        assert ran.code == 0, ran.err
        assert len(ran.data["sites"]) == 2 * len(model.blocks)
        assert cli("inspect", "timm:test_vit").code == ExitCode.USAGE
        assert cli("inspect", "timm:no_such_model", *weights).code == ExitCode.CANNOT_OPEN
    finally:
        torchvision_stand_in.remove()


# -- bench and doctor ---------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_bench_times_pairs(cli: Cli, compiler: str) -> None:
    torch._dynamo.reset()
    ran = cli("bench", f"{__name__}:attention", "--compiler", compiler, "--rounds", 3, "--json")
    assert ran.code == 0, ran.err
    assert ran.data["compiler"] == compiler
    low, high = ran.data["speed_interval"]
    assert 0 < low <= high
    assert ran.data["speed"] == ran.data["seconds_original"] / ran.data["seconds_rewritten"]


def test_doctor_says_what_works_and_what_to_install(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bda_fx.cli import doctor

    monkeypatch.setattr(doctor, "_imports", lambda module: module != "onnxruntime")
    ran = cli("doctor", "--json")
    assert ran.code == 0, ran.err
    assert ran.data["packages"]["torch"] == torch.__version__
    able = {ability["name"]: ability for ability in ran.data["abilities"]}
    assert able["Hugging Face directories"]["works"]
    assert not able["verify an ONNX file"]["works"]
    assert able["verify an ONNX file"]["missing"] == "onnxruntime"
    assert able["verify an ONNX file"]["install"] == "pip install 'bda-fx[onnx]'"
    assert "bda-fx[onnx]" in cli("doctor").out
