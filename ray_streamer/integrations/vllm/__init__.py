"""How does vLLM load through this package? As load format `ray_streamer`, which vLLM finds by its entry point for plugins.

vllm serve /models/llama --load-format ray_streamer --tensor-parallel-size 8
vllm serve /models/llama-config-only --load-format ray_streamer --model-loader-extra-config '{"uri": "s3://bucket/llama"}'
RAY_STREAMER_REPLACE_RUNAI=1 vllm serve s3://bucket/llama --tensor-parallel-size 8

options      what `--model-loader-extra-config` may say
internals    all that is known of vLLM's inside, and the versions that it was seen in
collective   what the ranks of the engine tell each other
reloading    new weights for a model that is loaded already
ahead        what is imported while vLLM still builds the model
loader       the load format: capture of vLLM's own loaders, one session of the ranks, slices straight into parameters
mistral_format  which weights of a folder: those in Mistral's own format, or the others
kept_tensors tensors of the checkpoint that a model keeps, instead of copying them
mismatch     weights that a model's own loader fails on
tied_heads   an `lm_head` of the checkpoint that the config would leave out
summary      what a load took, as a line of the log
model_files  config and tokenizer of a model at a uri, on each node
runai        commands and manifests written for Run:ai's streamer, when RAY_STREAMER_REPLACE_RUNAI=1 asks for it
"""

from __future__ import annotations

LOAD_FORMAT = "ray_streamer"


def register() -> None:
    """Called by vLLM in each of its processes, maybe several times; makes the load format known and starts nothing.

    Raises:
        SettingsError: This vLLM lacks what the load format needs, or RAY_STREAMER_REPLACE_RUNAI is neither 1 nor 0.
    """
    from ray_streamer.integrations.vllm.internals import carry_settings_to_ray_workers, register_format
    from ray_streamer.integrations.vllm.loader import RayStreamerLoader
    from ray_streamer.settings import replaces_runai

    register_format(LOAD_FORMAT, RayStreamerLoader)
    carry_settings_to_ray_workers()
    if replaces_runai():
        from ray_streamer.integrations.vllm.runai import answer_for_runai

        answer_for_runai()
