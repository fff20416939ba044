"""How does Ray Serve LLM load through this package? By a callback of its own, and by load format `ray_streamer` of vLLM.

    from ray.serve.llm import build_openai_app
    from ray_streamer.integrations.ray_llm import llm_config
    app = build_openai_app({"llm_configs": [llm_config("s3://bucket/llama", tp=8)]})

1. Ray runs one task on each node of the replica's placement group. There the callback fetches config and tokenizer into the node's
   cache, and Ray downloads nothing.
2. In the replica the callback names that folder as the engine's model.
3. The workers of vLLM load the weights from `uri`, each byte once per node.

Needs ray[llm] and vLLM on every node. Ray keeps its callbacks in modules without a promise; they are named here and nowhere else.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

from ray_streamer.api.files import cached
from ray_streamer.errors import SettingsError
from ray_streamer.integrations.vllm import LOAD_FORMAT
from ray_streamer.integrations.vllm.options import LoaderOptions
from ray_streamer.storage import absolute_uri

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray.serve.llm import LLMConfig

    from ray_streamer.storage import UriLike

TESTED_VERSIONS = ("2.60.0",)

_CALLBACK = "ray_streamer.integrations.ray_llm:StreamerCallback"
_EXTRA = "model_loader_extra_config"


def _of_ray(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"this needs {module}.{name}, which this environment does not have: {error}. Install ray[llm]; it was tested with "
            f"Ray {', '.join(TESTED_VERSIONS)}"
        ) from error


_CallbackBase: Any = _of_ray("ray.llm._internal.common.callbacks.base", "CallbackBase")
_Downloads: Any = _of_ray("ray.llm._internal.common.utils.download_utils", "NodeModelDownloadable")


def llm_config(
    uri: UriLike,
    *,
    tp: int = 1,
    model_id: str | None = None,
    extra_config: Mapping[str, Any] | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    **config: Any,
) -> LLMConfig:
    """The configuration of a model that Ray Serve LLM serves from `uri`.

    Args:
        uri: The checkpoint, as in `load_sharded`; every node must be able to read it.
        tp: Ranks that share each tensor.
        model_id: What requests call the model; the last part of the uri when unset.
        extra_config: Settings of the load, as in vLLM's `--model-loader-extra-config`.
        engine_kwargs: Further arguments of vLLM's engine.
        **config: Further arguments of `LLMConfig`, such as `accelerator_type` and `deployment_config`.

    Raises:
        SettingsError: The uri cannot mean anything, or an argument says what this function says itself.
    """
    where = absolute_uri(uri)
    options = dict(extra_config or {})
    LoaderOptions.of(options)
    _refuse_taken("engine_kwargs", engine_kwargs or {}, ("load_format", _EXTRA, "tensor_parallel_size"))
    _refuse_taken("config", config, ("model_loading_config", "callback_config"))
    return _of_ray("ray.serve.llm", "LLMConfig")(
        model_loading_config={"model_id": model_id or where.rstrip("/").rpartition("/")[2], "model_source": where},
        engine_kwargs={
            **(engine_kwargs or {}),
            "tensor_parallel_size": tp,
            "load_format": LOAD_FORMAT,
            _EXTRA: {"uri": where, **options},
        },
        callback_config={"callback_class": _CALLBACK},
        **config,
    )


class StreamerCallback(_CallbackBase):
    """Ray Serve LLM's callback that serves a model whose weights stay where they are.

    For a configuration of your own: `callback_config={"callback_class": "ray_streamer.integrations.ray_llm:StreamerCallback"}`.
    `model_source` says where the model is. `load_format` and `model_loader_extra_config` need not be given.

    Raises:
        SettingsError: The configuration asks for another load format, or does not say where the model is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ctx.worker_node_download_model = _Downloads.NONE
        given = self.llm_config.engine_kwargs
        if str(given.get("load_format") or LOAD_FORMAT).lower() != LOAD_FORMAT:
            raise SettingsError(
                f"engine_kwargs say load_format={given['load_format']!r}, but {_CALLBACK} is for {LOAD_FORMAT}; leave one of them out"
            )
        extra = dict(given.get(_EXTRA) or {})
        options = LoaderOptions.of(extra)
        self._uri = options.uri or _source_of(self.llm_config.model_loading_config)
        self._settings = options.settings
        self.llm_config.update_engine_kwargs(**{"load_format": LOAD_FORMAT, _EXTRA: {**extra, "uri": self._uri}})

    def on_before_download_model_files_distributed(self) -> None:
        """Called by Ray on each node: config and tokenizer come to its cache.

        Raises:
            StorageError: They cannot be read or written.
        """
        cached(self._uri, settings=self._settings)

    async def on_after_node_init(self) -> None:
        """Called by Ray in the replica: the engine's model is the folder in the cache."""
        folder = await asyncio.to_thread(cached, self._uri, settings=self._settings)
        self.llm_config.get_engine_config().hf_model_id = str(folder)


def _source_of(loading: Any) -> str:
    """Where the configuration says that the model is.

    Raises:
        SettingsError: It does not.
    """
    source = getattr(loading.model_source, "bucket_uri", loading.model_source)
    if not source:
        raise SettingsError(
            f"model_loading_config of {loading.model_id!r} has no model_source; give the model's uri, such as s3://bucket/model"
        )
    return absolute_uri(source)


def _refuse_taken(argument: str, given: Mapping[str, Any], taken: tuple[str, ...]) -> None:
    for name in taken:
        if name in given:
            raise SettingsError(
                f"{argument} says {name}, which llm_config sets itself; see its other arguments, or write an LLMConfig of your own "
                f"with {_CALLBACK}"
            )
