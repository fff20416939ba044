import json
import logging
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import ray_streamer
from ray_streamer.testing.checkpoints import llama_layout, mixtral_layout, write_checkpoint
from ray_streamer.units import human_bytes


@pytest.fixture
def stranger(tmp_path):
    """A checkpoint of no known model: two matrices and a vector."""
    tensors = {"a.weight": np.zeros((8, 6), np.float32), "b.weight": np.ones((4, 4), np.float16), "c": np.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_inspect_counts(invoke, checkpoint):
    found = json.loads(invoke("inspect", checkpoint, "--top", 1, "--json").stdout)
    assert found["model_type"] == "llama"
    assert found["num_tensors"] == 21
    assert found["dtypes"] == [{"name": "BF16", "num_tensors": 21, "num_bytes": found["checkpoint_bytes"]}]
    assert [file["name"] for file in found["files"]] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    (largest,) = found["largest"]
    assert (largest["name"], largest["shape"]) == ("model.embed_tokens.weight", [4001, 256])
    assert found["legal_tp"] == [1, 2, 4, 8]
    row_parallel = {share["name"]: share for share in found["placements"]}["split, dimension 1 (row-parallel)"]
    assert (row_parallel["num_tensors"], row_parallel["num_bytes"]) == (4, 2 * 2 * (256 * 256 + 256 * 1024))
    for shares in ("files", "dtypes", "placements"):
        assert sum(share["num_bytes"] for share in found[shares]) == found["checkpoint_bytes"]
        assert sum(share["num_tensors"] for share in found[shares]) == 21


def test_inspect_shows_what_the_preset_does_not_place(invoke, tmp_path):
    layout = llama_layout(256, 1, 8, 4, 1024, 4000)
    strangers = [("model.adapter.weight", "BF16", (4, 8)), ("model.adapter.scale", "F32", (8,))]
    write_checkpoint(tmp_path, [*layout.tensors, *strangers], config=layout.config)
    shares = json.loads(invoke("inspect", tmp_path, "--json").stdout)["placements"]
    num_tensors = {share["name"]: share["num_tensors"] for share in shares}
    assert num_tensors["no rule"] == 1
    assert num_tensors["replicated"] == 3 + 1


def test_inspect_knows_no_placements_of_an_unknown_model(invoke, stranger):
    found = json.loads(invoke("inspect", stranger, "--json").stdout)
    assert (found["model_type"], found["placements"], found["legal_tp"]) == (None, [], [])
    assert {share["name"]: share["num_bytes"] for share in found["dtypes"]} == {"F32": 192, "F16": 32, "F64": 24}
    assert "No preset for this model" in invoke("inspect", stranger).stdout


def test_what_a_config_lacks_is_not_told_as_a_flag(invoke, stranger):
    refused = invoke("plan", stranger, "--tp", 2)
    assert "no preset for model type None of config.json" in refused.stderr
    planned = invoke("plan", stranger, "--tp", 2, "--rule", "*=replicate")
    assert "config.json names no model type: the given rules stand alone" in planned.stderr


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter of two modules, and its base model's config.json in a folder of its own."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    (base / "config.json").write_text(json.dumps(llama_layout(64, 1, 4, 2, 96, 160).config))
    modules = {"q_proj": (64, 64), "o_proj": (64, 64)}
    factors = {
        f"base_model.model.model.layers.0.self_attn.{module}.lora_{half}.weight": np.ones(shape, np.float32)
        for module, (outputs, inputs) in modules.items()
        for half, shape in (("A", (4, inputs)), ("B", (outputs, 4)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("uri", [".", "adapter_model.safetensors"])
def test_inspect_lays_an_adapter_out_as_a_load_does(invoke, adapter, uri):
    found = json.loads(invoke("inspect", adapter / uri, "--json").stdout)
    assert found["model_type"] == "llama"
    assert 2 in found["legal_tp"]
    assert {share["name"]: share["num_tensors"] for share in found["placements"]} == {
        "split, dimension 0 (column-parallel)": 1,  # lora_B of q_proj
        "split, dimension 1 (row-parallel)": 1,  # lora_A of o_proj
        "replicated": 2,
    }
    plan = json.loads(invoke("plan", adapter / uri, "--tp", 2, "--json").stdout)
    assert plan["checkpoint_bytes"] == found["checkpoint_bytes"]


@pytest.mark.parametrize("named", ["/nowhere", "s3://bucket/base", None])
def test_inspect_shows_an_adapter_whose_base_is_not_there(invoke, adapter, named):
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": named}))
    result = invoke("inspect", adapter, "--json")
    found = json.loads(result.stdout)
    assert (found["model_type"], found["placements"], found["num_tensors"]) == (None, [], 4)
    assert "the config of its base model" in result.stderr


@pytest.mark.parametrize("said", ["stranger", "./stranger/", "~/stranger", "stranger/model.safetensors"])
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_relative_paths_and_homes_are_the_callers(invoke, stranger, monkeypatch, command, said):
    monkeypatch.setenv("HOME", str(stranger.parent))
    monkeypatch.chdir(stranger.parent)
    rules = ("--tp", 1, "--rule", "*=replicate") if command == "plan" else ()
    result = invoke(command, said.replace("stranger", stranger.name), *rules, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["uri"].startswith(str(stranger))


def test_tables_show_sizes_and_names(invoke, checkpoint):
    table = invoke("inspect", checkpoint).stdout
    assert "model-00004-of-00004.safetensors" in table
    assert "4001 x 256" in table
    table = invoke("plan", checkpoint, "--tp", 4, "--nodes", 2, "--top", 2).stdout
    for words in ("(1.220x)", "Ranks", "Nodes", "of checkpoint", "Tensors that cost most", "exact: one run"):
        assert words in table


def test_names_that_look_like_markup_are_shown_as_they_are(invoke, tmp_path):
    save_file({"[red]a[/]": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert "[red]a[/]" in invoke("inspect", tmp_path).stdout


def test_plan_says_what_the_api_says(invoke, checkpoint):
    found = json.loads(invoke("plan", checkpoint, "--tp", 2, "--replicas", 2, "--nodes", 2, "--json").stdout)
    plan = ray_streamer.plan(str(checkpoint), 2, replicas=2, num_nodes=2)
    expected = plan.summary().as_dict()
    assert found.pop("plan_seconds") > 0
    assert found == json.loads(json.dumps(expected | {"plan_seconds": None}), object_hook=_without_plan_seconds)
    assert [rank["node"] for rank in found["ranks"]] == [0, 0, 1, 1]
    assert {"checkpoint_bytes", "needed_bytes", "read_bytes", "amplification", "requests", "plan_hash"} <= set(found)


def test_stages_and_experts_of_the_command_line_are_those_of_the_api(invoke, tmp_path):
    layout = mixtral_layout(64, 3, 8, 2, 32, 101, experts=4)
    write_checkpoint(tmp_path, layout.tensors, config=layout.config)

    def summary(*args):
        found = json.loads(invoke("plan", tmp_path, "--tp", 2, *args, "--json").stdout)
        return found["plan_hash"], len(found["ranks"])

    def expected(**arguments):
        plan = ray_streamer.plan(str(tmp_path), 2, **arguments)
        return plan.plan_hash, plan.topology.num_ranks

    assert summary("--pp", "2", "--ep", "--replicas", 2) == expected(pp=2, ep=True, replicas=2)
    assert summary("--pp", "1,2", "--ep", "4", "--replicas", 2) == expected(pp=(1, 2), ep=4, replicas=2)
    assert len({summary("--pp", "1,2"), summary("--pp", "2,1"), summary("--pp", "3"), summary("--ep")}) == 4
    assert invoke("plan", tmp_path, "--tp", 2, "--pp", "two").exit_code == 2
    assert invoke("plan", tmp_path, "--tp", 2, "--ep", "0").exit_code == 2
    assert "--ep 3 groups of experts" in invoke("plan", tmp_path, "--tp", 2, "--ep", "3").stderr


def test_which_results_and_experts_are_those_of_the_api(invoke, tmp_path):
    layout = mixtral_layout(64, 3, 8, 2, 32, 101, experts=4)
    folder = write_checkpoint(tmp_path / "model", layout.tensors, config=layout.config)
    balanced = [[0, 3], [1, 2]]
    (tmp_path / "experts.json").write_text(json.dumps(balanced))

    def said(*args):
        found = json.loads(invoke("plan", folder, "--tp", 2, *args, "--json").stdout)
        return found["plan_hash"], tuple(rank["result_bytes"] for rank in found["ranks"])

    def expected(**arguments):
        plan = ray_streamer.plan(folder, 2, **arguments)
        return plan.plan_hash, tuple(rank.result_bytes for rank in plan.summary().ranks)

    qkv = {"qkv": ("q_proj", "k_proj", "v_proj")}
    ways = {
        said(): expected(),
        said("--fuse"): expected(fuse=True),
        said("--fuse", "standard"): expected(fuse=True),
        said("--fuse", "qkv=q_proj,k_proj,v_proj"): expected(fuse=qkv),
        said("--dtype", "float32"): expected(dtype="float32"),
        said("--dtype", "float16", "--dtype", "*norm*=float32"): expected(dtype={"*norm*": "float32", "*": "float16"}),
        said("--rename", r"^model\.=", "--rename", "layers=h"): expected(rename=[(r"^model\.", ""), ("layers", "h")]),
        said("--ep", "--experts", "[[0, 3], [1, 2]]"): expected(ep=True, experts=balanced),
        said("--ep", "--experts", tmp_path / "experts.json"): expected(ep=True, experts=balanced),
        said("--ep", "--experts", '{"1": [[0, 3], [1, 2]]}'): expected(ep=True, experts={1: balanced}),
    }
    assert [way for way, wanted in ways.items() if way != wanted] == []
    assert len({plan_hash for plan_hash, _ in ways.values()}) == 8


def test_inspect_shows_what_a_load_would_make(invoke, checkpoint):
    found = json.loads(invoke("inspect", checkpoint, "--json").stdout)
    assert (found["num_results"], found["results"]) == (None, [])
    args = ("inspect", checkpoint, "--fuse", "--dtype", "float32", "--rename", r"^model\.=", "--top", 100)
    found = json.loads(invoke(*args, "--json").stdout)
    made = ray_streamer.load_rank(
        checkpoint, fuse=True, dtype="float32", rename={r"^model\.": ""}, rank=0, world_size=1
    )
    assert found["num_results"] == len(found["results"]) == len(made)
    for result in found["results"]:
        tensor = made[result["name"]]
        assert (result["shape"], result["num_bytes"]) == (list(tensor.shape), tensor.nbytes)
    assert "Loads as 15 tensors." in invoke(*args).stdout


def test_an_unknown_model_type_says_which_flag_helps(invoke, tmp_path):
    layout = llama_layout(256, 1, 8, 4, 1024, 4000)
    write_checkpoint(tmp_path, layout.tensors, config={**layout.config, "model_type": "brand_new"})
    result = invoke("plan", tmp_path, "--tp", 2)
    assert result.exit_code == 1
    assert "give --model-type llama" in result.stderr
    assert invoke("plan", tmp_path, "--tp", 2, "--model-type", "llama").exit_code == 0
    assert json.loads(invoke("inspect", tmp_path, "--json").stdout)["lookalikes"] == ["llama"]
    assert "--model-type llama" in invoke("inspect", tmp_path).stdout
    found = json.loads(invoke("inspect", tmp_path, "--model-type", "llama", "--json").stdout)
    assert (found["legal_tp"], found["lookalikes"]) == ([1, 2, 4, 8], [])
    assert "--model-type lama is none" in invoke("inspect", tmp_path, "--model-type", "lama").stderr


def test_inspect_takes_rules_of_its_own(invoke, stranger):
    found = json.loads(invoke("inspect", stranger, "--rule", "a.*=split:0", "--rule", "b.*=skip", "--json").stdout)
    assert {share["name"]: share["num_tensors"] for share in found["placements"]} == {
        "split, dimension 0 (column-parallel)": 1,
        "skipped": 1,
        "replicated": 1,
    }
    assert found["legal_tp"] == [1, 2, 4, 8]
    result = invoke("inspect", stranger, "--rule", "nothing.*=skip")
    assert result.exit_code == 1
    assert "nothing.*" in result.stderr


def _without_plan_seconds(value):
    value.pop("plan_seconds", None)
    return value


def test_rules_of_the_command_line_lay_tensors_out(invoke, stranger):
    args = ("plan", stranger, "--tp", 2, "--json", "--top", 3, "--rank", 1)
    assert json.loads(invoke(*args).stdout)["error"]["type"] == "ShardingError"
    result = invoke(*args, "--rule", "a.*=split:1", "--rule", "*=skip")
    tensors = {tensor["name"]: tensor for tensor in json.loads(result.stdout)["tensors"]}
    assert tensors["a.weight"]["result_shape"] == [8, 3]
    assert tensors["b.weight"]["strategy"] == "skipped"
    result = invoke(*args, "--rule", "a.*=split:0", "--unmatched", "replicate")
    tensors = {tensor["name"]: tensor for tensor in json.loads(result.stdout)["tensors"]}
    assert tensors["a.weight"]["result_shape"] == [4, 6]
    assert tensors["b.weight"]["strategy"] == "replicated"


@pytest.fixture
def drafting(tmp_path):
    """A model with a layer for multi-token prediction after its own."""
    tensors = [
        ("model.embed_tokens.weight", "F32", (130, 8)),
        ("model.layers.0.self_attn.q_proj.weight", "F32", (8, 8)),
        ("model.layers.1.self_attn.q_proj.weight", "F32", (8, 8)),
    ]
    config = {"model_type": "glm4_moe", "num_hidden_layers": 1, "num_attention_heads": 2, "n_routed_experts": 4}
    return write_checkpoint(tmp_path / "drafting", tensors, config=config)


@pytest.mark.parametrize(("options", "rows", "held"), [((), 65, False), (("--layout", "vllm", "--mtp"), 96, True)])
def test_layouts_and_drafts(invoke, drafting, options, rows, held):
    result = invoke("plan", drafting, "--tp", 2, "--json", "--top", 3, "--rank", 1, *options)
    tensors = {tensor["name"]: tensor for tensor in json.loads(result.stdout)["tensors"]}
    assert tensors["model.embed_tokens.weight"]["result_shape"] == [rows, 8]
    assert (tensors["model.layers.1.self_attn.q_proj.weight"]["strategy"] != "skipped") is held


@pytest.mark.parametrize(("rank", "rows"), [(0, 2001), (1, 2000)])
def test_tensors_are_explained_as_one_rank_sees_them(invoke, checkpoint, rank, rows):
    result = invoke("plan", checkpoint, "--tp", 2, "--top", 21, "--rank", rank, "--json")
    shapes = {tensor["name"]: tensor["result_shape"] for tensor in json.loads(result.stdout)["tensors"]}
    assert shapes["lm_head.weight"] == [rows, 256]


def test_a_rank_outside_the_mesh_is_wrong_usage(invoke, checkpoint):
    assert invoke("plan", checkpoint, "--tp", 2, "--rank", 2).exit_code == 2


def test_plan_writes_its_tables(invoke, checkpoint, tmp_path):
    result = invoke("plan", checkpoint, "--tp", 2, "--out", tmp_path / "plan")
    assert result.exit_code == 0
    summary = json.loads((tmp_path / "plan" / "summary.json").read_text())
    assert pq.read_table(tmp_path / "plan" / "blocks.parquet").num_rows == summary["requests"]


def test_a_failure_is_one_line_and_exit_code_1(invoke, checkpoint):
    result = invoke("plan", checkpoint, "--tp", 2, "--memory-limit", 100)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("BudgetError: --memory-limit of 100 bytes per rank")
    assert result.stderr.count("\n") == 1


def test_verbose_shows_where_an_error_came_from(invoke):
    for args in (("-v", "inspect", "/nowhere"), ("inspect", "/nowhere", "-v")):
        stderr = invoke(*args).stderr
        assert "Traceback" in stderr
        assert "ObjectMissingError: no such file or folder: /nowhere" in stderr
    assert "Traceback" not in invoke("inspect", "/nowhere").stderr


def test_a_failure_is_one_json_object(invoke):
    result = invoke("inspect", "/nowhere", "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ObjectMissingError"
    assert error["message"].startswith("no such file or folder: /nowhere")
    assert result.stderr == ""


def test_an_error_that_nobody_foresaw_is_an_object_too(invoke, checkpoint, monkeypatch):
    def fail(*_args, **_options):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("ray_streamer.checkpoint.named.open_checkpoint", fail)
    result = invoke("inspect", checkpoint, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"error": {"type": "ZeroDivisionError", "message": "oh"}}
    assert "Traceback" in result.stderr


def test_logs_go_to_stderr_and_end_with_the_command(invoke, checkpoint):
    result = invoke("inspect", checkpoint, "--json", "-v")
    assert "INFO ray_streamer.checkpoint.open: opened" in result.stderr
    json.loads(result.stdout)
    assert logging.getLogger("ray_streamer").handlers == []
    assert "INFO" not in invoke("inspect", checkpoint).stderr


def test_the_program_starts_quickly_and_without_ray_or_torch(tmp_path):
    code = "import sys; from ray_streamer.cli import main; main(['plan', '--help'], standalone_mode=False)"
    code += "; print(sorted({'ray', 'torch', 'pyarrow', 'boto3'} & set(sys.modules)), file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"


def test_a_plan_needs_nothing_that_only_several_ranks_or_other_stores_do(checkpoint):
    code = "import sys, ray_streamer; ray_streamer.plan(sys.argv[1], tp=2)"
    code += "; print(sorted({'ray', 'torch', 'pyarrow', 'boto3', 'numpy.ma', 'psutil'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_version_is_the_packages(invoke):
    code = "from ray_streamer.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == f"ray-streamer {version('ray_streamer')}\n"


@pytest.mark.parametrize(("args", "code"), [(["inspect", "/nowhere"], 1), (["inspect"], 2), (["--help"], 0)])
def test_exit_codes_of_the_process(args, code):
    program = "from ray_streamer.cli import main; main()"
    assert subprocess.run([sys.executable, "-c", program, *args], capture_output=True).returncode == code


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1500, "1.46 KiB"), (10 << 30, "10 GiB"), (1 << 62, "4096 PiB")],
)
def test_human_bytes(num_bytes, text):
    assert human_bytes(num_bytes) == text
