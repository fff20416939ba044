"""How does vLLM's load format `ray_streamer` fill a model? The model's own loader says what it wants, and this package brings it.

1. All ranks of the engine meet; one of each node reads the checkpoint's headers.
2. Each rank runs the model's `load_weights` with tensors that hold no values, and learns which slices go where.
3. Each node reads every byte that one of its ranks wants once; slices land in the parameters themselves.

What a loader does with values, and not only with places, is read while it runs, by the ranks of a node together
(`CaptureReport.whole`).
"""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ray_streamer.api.rank import stream_rank
from ray_streamer.integrations.captured_slices import CapturedSlices, contents_of
from ray_streamer.integrations.vllm import internals, mismatch
from ray_streamer.integrations.vllm.ahead import prepare_load
from ray_streamer.integrations.vllm.collective import is_first
from ray_streamer.integrations.vllm.kept_tensors import fill_kept
from ray_streamer.integrations.vllm.mistral_format import in_format_of_config
from ray_streamer.integrations.vllm.model_files import restore_model_files
from ray_streamer.integrations.vllm.options import LoaderOptions
from ray_streamer.integrations.vllm.reloading import Origin, forms_of, origins, reload_tensors
from ray_streamer.integrations.vllm.summary import Summary, gather_summaries
from ray_streamer.integrations.vllm.tied_heads import refuse_other_head

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    import torch.distributed as dist
    from torch import nn

    from ray_streamer.rank.statistics import RankStatistics

BaseModelLoader: Any = internals.internal("vllm.model_executor.model_loader", "BaseModelLoader")

logger = internals.logger_of(__name__)


class RayStreamerLoader(BaseModelLoader):
    """vLLM's load format `ray_streamer`; vLLM makes one for each load.

    Attributes:
        summary: What the load took on this rank; None before it.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self._options = LoaderOptions.of(load_config.model_loader_extra_config)
        self.summary: Summary | None = None
        internals.say_untested_version(logger)

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded: weights go from where they are into the parameters."""

    def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """As vLLM's own loaders do it, on a node that has the model's config and tokenizer."""
        said = self._options.uri_of(is_draft=self._has_own_files(model_config))
        restore_model_files(model_config, said, self._options.settings)
        prepare_load(said or model_config.model_weights or model_config.model, self._options.settings)
        return super().load_model(vllm_config, model_config, *args, **kwargs)

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fills the parameters and buffers of `model`; every rank of the engine calls it.

        Raises:
            RayStreamerError: The checkpoint cannot be read, or another rank failed; nothing of the model may be used then.
            ValueError: The checkpoint lacks parameters of the model.
        """
        internals.refuse_own_files(model)
        started = time.perf_counter()
        is_draft = self._has_own_files(model_config)
        said = self._options.uri_of(is_draft=is_draft)
        uri = self._place(model_config, said)
        origin = origins[model] = Origin(
            _marked(model_config), self._marked_uri(is_draft=is_draft), uri, is_draft=is_draft
        )
        secondary = internals.secondary_tensors(model, self.load_config)
        group, device = internals.loading_group(model_config), device_of(model)

        def load(tensors: Iterable[tuple[str, torch.Tensor]]) -> Any:
            self._compare_configs(captured, model_config, uri, group)
            loaded = mismatch.load_weights(model, itertools.chain(tensors, secondary), uri)
            fill_kept(model, device)
            return loaded

        captured = CapturedSlices(
            uri,
            self._options.settings,
            load=load,
            targets=lambda: targets_of(model),
            skips=internals.skips_tensor(model),
        )
        statistics = self._fill(uri, captured, device, group)
        internals.refuse_missing(model, captured.loaded, model_config)
        refuse_other_head(captured, model, model_config, uri, self._options.settings, group)
        assert captured.index is not None
        origin.contents, origin.taken = contents_of(captured.index), forms_of(captured.index, captured.taken)
        self.summary = Summary.of(captured, statistics, seconds=time.perf_counter() - started)
        line = gather_summaries(self.summary, captured.index, group)
        if line is not None:
            logger.info(line)

    def _has_own_files(self, model_config: Any) -> bool:
        """Whether this is a draft model for which not `uri` is said, but `draft_uri` or nothing."""
        if not internals.is_draft(model_config):
            return False
        return self._options.draft_uri is not None or not internals.has_targets_folder(model_config)

    def _compare_configs(
        self, captured: CapturedSlices, model_config: Any, uri: str, group: dist.ProcessGroup | None
    ) -> None:
        """Before anything is loaded: whether the weights lie beside the config that the engine has."""
        assert captured.index is not None
        place = internals.place_of_config(model_config)
        if place in (None, uri):
            return
        said = mismatch.compare_configs(captured.index.config, uri, place, self._options.settings)
        if said is not None and is_first(group):
            logger.warning("ray_streamer: %s", said)

    def _fill(self, uri: str, captured: CapturedSlices, device: str, group: dist.ProcessGroup | None) -> RankStatistics:
        """Loads what the model's loader says into the parameters, and shows how far it is."""
        statistics: list[RankStatistics] = []
        tensors = stream_rank(
            uri,
            slices=captured,
            out=captured.out,
            settings=self._options.settings,
            device=device,
            on_statistics=statistics.append,
            group=group,
            # A rank on its own is told so: what else is in the process is none of its load.
            rank=0 if group is None else None,
            world_size=1 if group is None else None,
        )
        with closing(tensors):
            first = next(tensors, None)
            num_bytes = sum(tensor.nbytes for tensor in captured.out.values())
            with internals.progress_bar(self.load_config, doing="Loading weights", num_bytes=num_bytes) as bar:
                for _, tensor in itertools.chain([] if first is None else [first], tensors):
                    bar.update(tensor.nbytes)
        return statistics[0]

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of all that a reload needs; every rank of the tensor-parallel group calls it.

        Raises:
            RayStreamerError: The checkpoint cannot be read; the model is as it was. For errors of the iterator see `reloading`.
        """
        origin = origins.get(model)
        return reload_tensors(
            self._uri_of_reload(model_config, origin),
            model,
            settings=self._options.settings,
            load_config=self.load_config,
            origin=origin,
        )

    def _uri_of_reload(self, model_config: Any, origin: Origin | None) -> str:
        """What was named last: the `weights_path` of this reload, else the uri of options that were set anew, else what was read last."""
        said = self._options.uri_of(is_draft=origin is not None and origin.is_draft)
        # vLLM puts each weights_path there, another object even where it says the same; so does update_config with options.
        is_named = origin is not None and model_config.model is not origin.model
        if origin is not None and not is_named and said is origin.uri:
            return origin.place
        place = self._place(model_config, None if is_named else said)
        if origin is not None:
            origin.model, origin.uri = _marked(model_config), self._marked_uri(is_draft=origin.is_draft)
        return place

    def _place(self, model_config: Any, said: str | None) -> str:
        place = said or internals.place_of_weights(model_config, self.load_config)
        return in_format_of_config(place, model_config, self._options.settings)

    def _marked_uri(self, *, is_draft: bool) -> str | None:
        """What the options say of the place, as an object that nobody else has; see `_marked`."""
        said = self._options.uri_of(is_draft=is_draft)
        if said is not None:
            key = "draft_uri" if is_draft else "uri"
            self.load_config.model_loader_extra_config[key] = said = _copied(said)
        return said


def _marked(model_config: Any) -> str:
    """What the configuration calls the model, as an object that nobody else has, by which it is known again."""
    model_config.model = marked = _copied(model_config.model)
    return marked


def _copied(text: str) -> str:
    return "".join([*text])


def targets_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, then buffers, by name; of tensors that share memory the first name is there."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def device_of(model: nn.Module) -> str:
    """Where the model's parameters are, as `load_rank` takes it."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    return str(next(iter(devices), "cpu"))
