"""A pipeline of diffusers opens by its uri: every component's files, by its own index json or alone, with names that say the component."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import ray_streamer
from ray_streamer.errors import CheckpointError, ObjectMissingError, ShardingError

INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.36.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "image_encoder": [None, None],
    "feature_extractor": None,
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture
def pipeline(tmp_path):
    """The folder, and its tensors by the names that a load gives them."""
    tensors = {}

    def save(path, names):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        own = {name: torch.randn(4, 3) for name in names}
        save_file(own, tmp_path / path)
        tensors.update({f"{path.partition('/')[0]}.{name}": tensor for name, tensor in own.items()})

    save("vae/diffusion_pytorch_model.safetensors", ["decoder.conv_in.weight"])
    save("text_encoder/model.safetensors", ["shared.weight"])
    save("text_encoder_2/model-00001-of-00002.safetensors", ["shared.weight"])
    save("text_encoder_2/model-00002-of-00002.safetensors", ["final.weight"])
    save("transformer/diffusion_pytorch_model-00001-of-00001.safetensors", ["x_embedder.weight"])
    # Not those of the pipeline: a variant, and what model_index.json does not name.
    for path in ("vae/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / path)
    weight_map = {
        "shared.weight": "model-00001-of-00002.safetensors",
        "final.weight": "model-00002-of-00002.safetensors",
    }
    (tmp_path / "text_encoder_2/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weight_map = {"x_embedder.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}
    index = tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    return tmp_path, tensors


def test_all_components_load_by_the_uri_of_the_pipeline(pipeline):
    folder, tensors = pipeline
    loaded = ray_streamer.load_rank(folder)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())


def test_files_for_other_programs_beside_the_components_are_not_the_pipelines(pipeline):
    """As FLUX.1 and Stable Diffusion are published."""
    folder, tensors = pipeline
    for name in ("flux1-dev.safetensors", "ae.safetensors"):
        save_file({"double_blocks.0.weight": torch.zeros(1)}, folder / name)
    assert ray_streamer.load_rank(folder).keys() == tensors.keys()
    loaded = ray_streamer.load_rank(folder / "flux1-dev.safetensors")
    assert loaded.keys() == {"double_blocks.0.weight"}


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_file_that_is_called_as_a_models_comes_before_the_components(pipeline, name):
    folder, _ = pipeline
    save_file({"w": torch.zeros(1)}, folder / name)
    assert ray_streamer.load_rank(folder).keys() == {"w"}


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder_2"])
def test_a_component_loads_by_its_own_uri_under_its_own_names(pipeline, component):
    folder, tensors = pipeline
    save_file({"x_embedder.weight": torch.zeros(1)}, folder / "transformer/diffusion_pytorch_model.fp16.safetensors")
    loaded = ray_streamer.load_rank(folder / component)
    expected = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{component}.")}
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())


def test_components_are_cut_by_rules_that_name_them(pipeline):
    folder, _ = pipeline
    with pytest.raises(ShardingError, match="no preset for model type"):
        ray_streamer.plan(folder, tp=2)
    plan = ray_streamer.plan(folder, tp=2, rules={"transformer.*": ray_streamer.Split(0)}, unmatched="replicate")
    assert "transformer.x_embedder.weight" in plan.index.names


def test_a_file_that_a_component_lacks_is_named(pipeline):
    folder, _ = pipeline
    (folder / "text_encoder_2/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ObjectMissingError, match="text_encoder_2/model-00002-of-00002"):
        ray_streamer.load_rank(folder)


@pytest.mark.parametrize(
    ("gone", "left", "said"),
    [
        pytest.param(
            ["vae/diffusion_pytorch_model.safetensors"], [], "names vae, .*only 'diffusion.*fp16", id="variant"
        ),
        pytest.param(["text_encoder/model.safetensors"], [], "names text_encoder, which has no files", id="empty"),
        pytest.param(["text_encoder/model.safetensors"], ["text_encoder/config.json"], "has no diff", id="config-only"),
        pytest.param(["text_encoder/model.safetensors"], ["text_encoder/model.bin"], "only 'model.bin'", id="pickles"),
        pytest.param(
            ["text_encoder_2/model.safetensors.index.json", "text_encoder_2/model-00002-of-00002.safetensors"],
            [],
            "text_encoder_2 is incomplete: .*model-00002-of-00002",
            id="counted",
        ),
        pytest.param(
            ["text_encoder/model.safetensors"],
            ["text_encoder/model.safetensors.incomplete"],
            "not completely written",
            id="under-way",
        ),
    ],
)
def test_weights_that_a_component_lacks_are_told(pipeline, gone, left, said):
    folder, _ = pipeline
    for path in gone:
        (folder / path).unlink()
    for path in left:
        (folder / path).write_text("{}")
    with pytest.raises(ObjectMissingError, match=said):
        ray_streamer.load_rank(folder)


def test_counted_files_of_a_component_need_no_index_json(pipeline):
    folder, tensors = pipeline
    (folder / "text_encoder_2/model.safetensors.index.json").unlink()
    assert ray_streamer.load_rank(folder).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        pytest.param("model_index.json", "[", r"model_index\.json .*fetch it again", id="no-json"),
        pytest.param(
            "model_index.json", '{"../vae": ["a", "b"], "_x": ["a", "b"]}', "give the folder of one", id="none"
        ),
        pytest.param(
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            '{"weight_map": {"a": "../../x.safetensors"}}',
            "x.safetensors",
            id="leaves-the-folder",
        ),
    ],
)
def test_a_malformed_pipeline_is_refused(pipeline, name, text, said):
    folder, _ = pipeline
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        ray_streamer.load_rank(folder)


@pytest.mark.slow
def test_a_pipeline_lies_in_s3_too(pipeline, s3_credentials):
    folder, tensors = pipeline
    loaded = ray_streamer.load_rank(s3_credentials.upload_folder(folder, "pipelines", "flux"))
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())
