"""The command line as a user meets it: what it prints, how it refuses, and with which exit code."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.cli.commands import COMMANDS
from mmerge.pipeline.cli.main import main

SAMPLES = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "lab" / "samples"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line; return exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def refused(call: Call, match: str, *arguments: object) -> None:
    """The command ends with code 1 and one error that holds `match`, and no traceback."""
    code, out, err = call(*arguments)
    assert code == 1, (out, err)
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert match in " ".join(err.split()), err


def test_help_names_every_command_and_the_exit_codes(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for word in (
        "plan",
        "run",
        "show",
        "verify",
        "generate",
        "export",
        "methods",
        "schema",
        "Exit codes",
    ):
        assert word in out


def test_no_arguments_show_the_help_and_a_wrong_option_is_wrong_usage(call: Call) -> None:
    assert "Usage" in "".join(call()[1:])
    assert call("plan", "--nonsense")[0] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_what_a_command_says_of_itself(call: Call, name: str) -> None:
    code, command_help, _ = call(name, "--help")
    assert code == 0
    assert f" {name} [OPTIONS]" in command_help
    summary = " ".join(command_help.split("\n\n")[1].split())
    _, overview, _ = call("--help")
    assert f" {name} {summary} " in " ".join(overview.split())


def test_a_mistyped_command_is_wrong_usage_and_a_like_one_is_named(call: Call) -> None:
    code, _, err = call("plna")
    assert code == 2
    assert "Did you mean 'plan'" in err


def test_a_plan_is_printed_for_people_and_for_scripts(call: Call, lab: Any) -> None:
    recipe = lab.write_recipe(lab.make_all())
    code, out, _ = call("plan", recipe)
    assert code == 0
    for word in (
        "layers.0",
        "peak memory",
        "multi_modal_projector",
        "embed_tokens.weight rows 40 to 41",
    ):
        assert word in out, out
    first, second = (call("plan", recipe, "--json")[1] for _ in range(2))
    assert first == second
    assert json.loads(first)["num_parameters"] > 5000
    assert not (lab.folder / "store").exists(), "a plan writes nothing"


def test_a_run_shows_its_shards_and_a_second_run_says_there_is_nothing_to_do(
    call: Call, lab: Any
) -> None:
    recipe = lab.write_recipe(lab.make_all())
    code, out, _ = call("run", recipe, "--executor", "serial")
    assert code == 0
    assert "built" in out
    code, out, _ = call("run", recipe, "--executor", "serial")
    assert code == 0
    assert out.startswith("nothing to do: build ")
    store = lab.folder / "store"
    code, out, _ = call("show", store, "--layers")
    assert code == 0
    for word in ("mask density", "catastrophic", "selfish", "image+audio", "layer"):
        assert word in out, out
    assert (
        json.loads(call("show", store, "--json")[1])["statistics"]["masks"]["image"]["density"]
        > 0.1
    )
    code, out, _ = call("verify", store)
    assert code == 0
    assert "all digests are equal" in out


def test_a_store_of_several_composites_is_listed_and_asks_which(call: Call, lab: Any) -> None:
    raw = lab.make_all()
    for method in ("mmer", "ties"):
        call(
            "run",
            lab.write_recipe(raw | {"method": method, "name": method}),
            "--executor",
            "serial",
        )
    code, out, _ = call("show", lab.folder / "store")
    assert code == 0
    assert "#mmer" in out
    assert "#ties" in out
    refused(
        call, "holds several composites: add one of #mmer, #ties", "verify", lab.folder / "store"
    )
    refused(
        call,
        "no composite 'nothing'; names there: mmer, ties",
        "verify",
        f"{lab.folder / 'store'}#nothing",
    )


def test_a_damage_is_found_and_a_fresh_run_repairs_it(call: Call, lab: Any) -> None:
    recipe = lab.write_recipe(lab.make_all())
    call("run", recipe, "--executor", "serial")
    path = max((lab.folder / "store" / "objects").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(call, f"objects/{path.name}", "verify", lab.folder / "store")
    assert call("run", recipe, "--executor", "serial", "--fresh")[0] == 0
    assert call("verify", lab.folder / "store")[0] == 0


def test_the_schema_accepts_the_committed_recipes(call: Call, repository: Path) -> None:
    import yaml

    schema = json.loads(call("schema")[1])
    recipes = sorted((repository / "examples" / "lab" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        jsonschema.validate(yaml.safe_load(recipe.read_text()), schema)


def test_methods_are_listed_with_source_and_parameters(call: Call) -> None:
    _, out, _ = call("methods")
    for word in (
        "mmer",
        "arXiv 2505.17110",
        "density",
        "experts.NAME.mask_scale",
        "ties",
        "[mean, sum, max]",
        "the base may be left out",
    ):
        assert word in out


def test_the_documentation_lists_every_method_as_it_is(call: Call, repository: Path) -> None:
    _, out, _ = call("methods", "--markdown")
    text = (repository / "docs" / "methods.md").read_text()
    assert out.strip() in text, (
        "docs/methods.md is behind: put the output of 'mmerge methods --markdown' at its end"
    )


def test_a_composite_answers_on_the_command_line(call: Call, lab_store: str) -> None:
    image, sound = SAMPLES / "image_seven_light.png", SAMPLES / "sound_three_low.wav"
    code, out, err = call(
        "generate",
        f"{lab_store}#mmer",
        "--image",
        image,
        "which digit is in the image ?",
        "--max-new-tokens",
        3,
    )
    assert (code, out.strip()) == (0, "seven"), err
    code, out, err = call(
        "generate",
        f"{lab_store}#mmer",
        "--image",
        image,
        "--audio",
        sound,
        "which digit is in the sound ?",
        "--max-new-tokens",
        3,
    )
    assert (code, out.strip()) == (0, "three"), err
    code, out, err = call(
        "generate",
        f"{lab_store}#mmer",
        "--expert",
        "audio",
        "--media",
        f"audio={sound}",
        "which digit is in the sound ?",
        "--max-new-tokens",
        3,
    )
    assert (code, out.strip()) == (0, "three"), err


def test_an_export_is_written_and_named(call: Call, lab_store: str, tmp_path: Path) -> None:
    code, out, _ = call(
        "export", f"{lab_store}#mmer", "--expert", "image", "--to", tmp_path / "image"
    )
    assert code == 0
    assert "model.safetensors" in out
    assert (tmp_path / "image" / "config.json").is_file()
    modes = {
        name: (tmp_path / "image" / name).stat().st_mode
        for name in ("config.json", "model.safetensors")
    }
    assert len(set(modes.values())) == 1, "who may read one file may read all"
    refused(call, "is not empty", "export", f"{lab_store}#mmer", "--to", tmp_path / "image")
    refused(
        call, "is a file", "export", f"{lab_store}#mmer", "--to", tmp_path / "image" / "config.json"
    )
    refused(
        call,
        "goes to a folder of this machine",
        "export",
        f"{lab_store}#mmer",
        "--to",
        "s3://bucket/image",
    )
    refused(
        call,
        "has more than 128",
        "export",
        f"{lab_store}#mmer",
        "--lora-rank",
        100000,
        "--to",
        tmp_path / "adapter",
    )


def test_bad_questions_are_refused(call: Call, lab_store: str, tmp_path: Path) -> None:
    uri = f"{lab_store}#mmer"
    refused(call, "give a question", "generate", uri)
    refused(
        call,
        "no.png: no such image file",
        "generate",
        uri,
        "--image",
        tmp_path / "no.png",
        "what ?",
    )
    refused(call, "no expert for modality 'smell'", "generate", uri, "--media", "smell=x", "what ?")
    refused(
        call,
        "--media: expected KIND=FILE, got 'smell'",
        "generate",
        uri,
        "--media",
        "smell",
        "what ?",
    )


def test_bad_input_is_refused_with_one_clear_line(call: Call, lab: Any) -> None:
    raw = lab.make_all()

    def run(match: str, **changes: Any) -> None:
        refused(call, match, "run", lab.write_recipe(raw | changes), "--executor", "serial")
        assert not list(lab.folder.glob("store/builds/*/manifest.json"))

    refused(call, "no such recipe file", "run", lab.folder / "none.yaml")
    run("expert 'image': ", experts={"image": {"path": "nowhere", "modality": "image"}})
    run("nowhere: no such folder. Check the path in the recipe", base="nowhere")
    run("densty: unknown key for method 'mmer'. Did you mean 'density'?", densty=0.8)
    run("density: expected a number in (0, 1], got 80", density=80)
    run(
        "experts.audio.path",
        experts={name: {"path": "image", "modality": name} for name in ("image", "audio")},
    )
    (lab.folder / "file").write_text("")
    run("Choose another 'output' or grant write access", output="file/store")
    refused(
        call,
        "--executor: expected 'ray', 'processes' or 'serial', got 'dask'",
        "run",
        lab.write_recipe(raw),
        "--executor",
        "dask",
    )
    refused(
        call,
        "multiple of 65536",
        "run",
        lab.write_recipe(raw),
        "--executor",
        "serial",
        "--block-entries",
        1000,
    )


def test_damaged_and_foreign_checkpoints_are_refused_with_one_clear_line(
    call: Call, lab: Any
) -> None:
    recipe = lab.write_recipe(lab.make_all())
    path = lab.folder / "audio" / "model.safetensors"
    whole = path.read_bytes()

    def run(match: str) -> None:
        refused(call, match, "run", recipe, "--executor", "serial")
        assert not list(lab.folder.glob("store/builds/*/manifest.json"))

    path.write_bytes(whole[:-10])
    run("the file is truncated")
    path.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    run("announces a header of 1,152,921,504,606,846,976 bytes")
    path.unlink()
    run("expert 'audio'")
    lab.make_expert(
        "audio", 1, change=lambda t: t.update({"language_model.model.norm.weight": torch.ones(17)})
    )
    run("model.norm.weight: expert 'audio' has (17,), the base has (16,)")
    lab.make_expert(
        "audio",
        1,
        change=lambda t: t["language_model.model.layers.0.mlp.up_proj.weight"].__setitem__(
            (2, 3), float("nan")
        ),
    )
    run("expert 'audio': language_model.model.layers.0.mlp.up_proj.weight: NaN at [2, 3]")
    config = lab.expert_config()
    config["text_config"] = config["text_config"] | {"num_hidden_layers": 3}
    lab.write("audio", lab.expert_tensors(1), config)
    run("num_hidden_layers")


def test_a_manifest_of_an_unknown_version_is_refused(call: Call, lab: Any) -> None:
    call("run", lab.write_recipe(lab.make_all()), "--executor", "serial")
    path = next((lab.folder / "store" / "builds").glob("*/manifest.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    for command in ("show", "verify"):
        refused(
            call,
            "has format version 99, this mmerge reads version 1",
            command,
            lab.folder / "store",
        )


def test_debug_shows_where_an_error_comes_from(lab: Any, call: Call) -> None:
    code, _, err = call("--debug", "run", str(lab.folder / "none.yaml"))
    assert code == 1
    assert "Traceback" in err
    assert "RecipeError" in err
    with pytest.raises(SystemExit):
        main(["--version"])


@pytest.mark.parametrize("kind", [MmergeError, RuntimeError])
def test_debug_prints_no_passwords_of_urls(
    call: Call, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        try:
            raise OSError("GET http://user:PASSWORD@host:9/bucket failed")
        except OSError as error:
            raise kind("no answer from http://user:PASSWORD@host:9/bucket") from error

    monkeypatch.setattr("mmerge.pipeline.views.catalogue.print_methods", fail)
    code, out, err = call("--debug", "methods")
    assert code == 1
    assert "Traceback" in err
    assert "http://***@host:9/bucket failed" in err
    assert "PASSWORD" not in out + err.replace('user:PASSWORD@host:9/bucket failed")', "")


@pytest.mark.parametrize(("error", "code"), [(EOFError, 1), (KeyboardInterrupt, 130)])
def test_a_file_that_ends_too_soon_is_an_error_and_ctrl_c_an_interrupt(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int
) -> None:
    def fail(*_: object) -> None:
        raise error("ran out of input")

    monkeypatch.setattr("mmerge.pipeline.views.catalogue.print_methods", fail)
    exit_code, _, err = call("methods")
    assert exit_code == code
    assert ("EOFError: ran out of input" in err) == (error is EOFError)
    assert ("interrupted" in err) == (error is KeyboardInterrupt)
