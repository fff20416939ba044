"""What does one rank of a group do that holds a model of transformers? Meet the others in a process group, load, generate.

open_meeting, meet     torch.distributed's process group over all ranks, once per start of the ranks
agree, load            as every rank; what is read is what transformers' own loading code asks for
generate               on all ranks at once, with the same arguments and the same seed
take_tokens, stop      meanwhile, from another thread
"""

# pyright: reportPrivateImportUsage=false
# torch.distributed does not list TCPStore among its names, and documents it.
from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.device import is_cuda
from ray_streamer.errors import StartupTimeoutError
from ray_streamer.integrations.transformers.bootstrap import ModelSlices
from ray_streamer.integrations.transformers.loader import ModelBuild
from ray_streamer.integrations.transformers.token_stream import Generated
from ray_streamer.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    import torch.distributed as dist

    from ray_streamer.cluster.worker import PlanDigest
    from ray_streamer.exchange.place import Place
    from ray_streamer.integrations.transformers.generation import TokenFeed
    from ray_streamer.planning.rank_plan import RankPlan
    from ray_streamer.rank.agreement import MemoryTerms
    from ray_streamer.rank.context import RankContext
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics


class ModelWorker(LoadWorker):
    """One rank of a model.

    Args:
        rank: Global rank.
        request: What to load; its slices are `ModelSlices`.
    """

    def __init__(self, rank: int, request: LoadRequest) -> None:
        super().__init__(rank, request)
        self._store: dist.TCPStore | None = None
        self._build: ModelBuild | None = None
        self._feed: TokenFeed | None = None

    def open_meeting(self, host: str) -> int:
        """Lets the ranks meet at this one; called on the first.

        Args:
            host: Address of this node, as the others reach it.

        Returns:
            The port, for `meet`.
        """
        self._store = self._meeting(host, 0, is_host=True)
        return self._store.port

    def meet(self, host: str, port: int) -> None:
        """Joins the process group; every rank calls it.

        Raises:
            StartupTimeoutError: Ranks did not come within `startup_timeout_seconds`, or cannot be reached.
        """
        from torch import distributed as dist

        device, num_ranks = self._device_name, self._request.mesh.num_ranks
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=device.partition(":")[2] or "0")
        try:
            # transformers computes on the GPU; whether to stop is told from CPU to CPU.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if is_cuda(device) else "gloo",
                store=self._store or self._meeting(host, port, is_host=False),
                rank=self._rank,
                world_size=num_ranks,
                timeout=self._timeout,
            )
        except RuntimeError as error:  # torch's, of the store as of every backend
            raise StartupTimeoutError(
                f"rank {self._rank} of {num_ranks} could not meet the others in a process group, on {host} port {port}, within "
                f"startup_timeout_seconds={self._timeout.total_seconds():g}: {first_line(error)}; see whether the nodes may connect to "
                "each other, and the other ranks' errors"
            ) from error

    def _meeting(self, host: str, port: int, *, is_host: bool) -> dist.TCPStore:
        # In these words, it waits for the thread that imports torch already.
        from torch import distributed as dist

        num_ranks = self._request.mesh.num_ranks
        return dist.TCPStore(host, port, num_ranks, is_master=is_host, wait_for_workers=False, timeout=self._timeout)

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._request.settings.startup_timeout_seconds)

    def agree(self, request: LoadRequest, index_bytes: bytes, place: Place, terms: MemoryTerms) -> PlanDigest:
        """As every rank; what this one holds is what transformers asks for when it makes the model.

        Raises:
            ShardingError: transformers cannot run the model with this tp, or its weights are quantized.
            CheckpointError: transformers cannot make the model of this checkpoint.
            RayStreamerError: As every rank.
        """
        asked = request.slices
        assert isinstance(asked, ModelSlices)
        build = ModelBuild(
            asked.model_class,
            request.uri,
            tp=request.mesh.tp,
            dtype=asked.dtype,
            device=self._device_name,
            settings=request.settings,
            model_arguments=asked.model_arguments,
        )
        # Two models at once may be more than there is room for.
        self._context = self._build = None
        self._build = build
        return super().agree(replace(request, slices=build.captured), index_bytes, place, terms)

    def load(self, agreement: str) -> RankStatistics:
        """As every rank; then the model is ready, beside its tensors."""
        statistics = super().load(agreement)
        assert self._build is not None
        self._context = replace(self._loaded(), model=self._build.finished())
        self._build = None
        return statistics

    def _held(self) -> Mapping[str, Any]:
        assert self._build is not None
        return self._build.captured.out

    def _tensors_to_fill(self, earlier: RankContext | None, mine: RankPlan) -> dict[str, torch.Tensor]:
        assert self._build is not None
        return self._build.captured.out

    def generate(self, arguments: dict[str, Any], ticket: int, seed: int, streams: bool) -> Generated | None:
        """What transformers' `generate` gives, and the tokens that were streamed, on the first rank; every rank calls it.

        Args:
            arguments: Of transformers' `generate`, equal on all ranks.
            ticket: Number of this generation; they grow.
            seed: Of torch's random numbers.
            streams: Whether its tokens are put into the feed.

        Raises:
            ValueError: transformers refuses the arguments; its other errors pass, too.
        """
        import torch
        from transformers import StoppingCriteriaList

        from ray_streamer.integrations.transformers.generation import StopTogether

        context, feed = self._loaded(), self.feed
        here = {
            name: value.to(context.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        criteria = StoppingCriteriaList([*(here.pop("stopping_criteria", None) or ()), StopTogether(feed)])
        feed.begin(ticket)
        try:
            torch.manual_seed(seed)
            tokens = context.model.generate(**here, streamer=feed if streams else None, stopping_criteria=criteria)
        finally:
            feed.end()
            self.forget_abort()
        return Generated(tokens.cpu(), feed.take(ticket, 0, 0.0)) if self._rank == 0 else None

    def take_tokens(self, ticket: int, seen: int, wait_seconds: float) -> list[int]:
        """Tokens after the first `seen` of a generation that streams; waits for one."""
        return self.feed.take(ticket, seen, wait_seconds)

    def stop(self, ticket: int) -> None:
        """Ends a generation with its next token; enough on one rank."""
        self.feed.stop(ticket)

    def is_idle(self) -> bool:
        """Whether no generation is under way."""
        return self.feed.is_over

    @property
    def feed(self) -> TokenFeed:
        """The tokens of this rank; made when they are asked for first."""
        with self._lock:
            if self._feed is None:
                from ray_streamer.integrations.transformers.generation import TokenFeed

                self._feed = TokenFeed()
            return self._feed
