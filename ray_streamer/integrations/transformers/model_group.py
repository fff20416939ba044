"""What does the caller of `load_sharded(bootstrap="transformers")` hold? The ranks of one model, which generate together.

One generation runs at a time: all ranks must take the same steps in the same order. Others wait for their turn.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

from ray_streamer.cluster.model import ShardedModel
from ray_streamer.cluster.phases import Phases
from ray_streamer.errors import ClusterError, SettingsError
from ray_streamer.integrations.transformers.token_stream import Generation, TokenStream
from ray_streamer.integrations.transformers.worker import ModelWorker
from ray_streamer.wording import brief, first_line

if TYPE_CHECKING:
    import torch

    from ray_streamer.cluster.group import WorkerGroup
    from ray_streamer.cluster.worker import LoadWorker
    from ray_streamer.rank.statistics import RankStatistics

_IDS = ("inputs", "input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
_OWN_ARGUMENTS = ("synced_gpus", "return_dict_in_generate")
# Seeds that torch takes.
_NUM_SEEDS = 1 << 63


class TransformersModel(ShardedModel):
    """A model of transformers over the ranks of a group of actors; `run` gives functions `context.model`, this rank's part.

    `reload` and `restart` make the model anew: ranks hold none while that lasts, and none after it failed.
    """

    worker_class: ClassVar[type[LoadWorker]] = ModelWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._turn = threading.Lock()
        self._tickets = itertools.count(1)
        self._is_out_of_step = False
        super().__init__(*args, **kwargs)

    def generate(
        self, inputs: Any = None, *, streamer: Any = None, seed: int | None = None, **arguments: Any
    ) -> torch.Tensor:
        """Token ids, as transformers' `generate` of a model gives them: prompt and answer, one row for each sequence.

        Args:
            inputs: Token ids of the prompts: a tensor, or a list of lists. A tokenizer's whole output goes in as
                `**tokenizer(...)` instead.
            streamer: An object of transformers, such as TextStreamer; gets each token as it comes.
            seed: Of sampling; a new one each time when unset.
            arguments: Of transformers' `generate`, such as max_new_tokens; pickled for every rank.

        Raises:
            RankFailedError: transformers refuses the arguments, or a rank failed; `cause` is the error.
            SettingsError: An argument cannot be given here.
        """
        arguments = _prepared(inputs, arguments)
        generation = self._begin(arguments, seed, streams=streamer is not None)
        if streamer is None:
            return generation.result()
        prompt = arguments.get("inputs", arguments.get("input_ids"))
        if prompt is not None:
            streamer.put(prompt)
        import torch

        for token in TokenStream(generation):
            streamer.put(torch.tensor([token]))
        streamer.end()
        return generation.result()

    def stream(self, inputs: Any = None, *, seed: int | None = None, **arguments: Any) -> TokenStream:
        """The new token ids of one prompt, each as it comes; takes the arguments of `generate`.

        An iterator. Closing it, or letting go of it, ends the generation on all ranks at the next token.

        Raises:
            RankFailedError: From the iterator: transformers refuses the arguments, or a rank failed.
            SettingsError: An argument cannot be given here.
        """
        return TokenStream(self._begin(_prepared(inputs, arguments), seed, streams=True))

    @property
    def needs_restart(self) -> bool:
        """Whether a rank failed or died during a generation, so that `generate` is refused until `restart` is called."""
        return self._is_out_of_step

    def restart(self, rank: int) -> RankStatistics:
        """Replaces all ranks' actors, since a process group cannot take in a new rank, and loads again what was loaded last.

        Args:
            rank: The one that died, say; dead or alive.

        Returns:
            What this rank's load did; `stats` has all.

        Raises:
            SettingsError: There is no such rank.
            ClusterError: The actors cannot be started.
            RankFailedError: A rank's load failed; an object that changed since the first load is such a failure.
        """
        rank = self._ready().checked_rank(rank)
        with self._changing(f"restart({rank})") as (group, loads):
            assert self._terms is not None
            phases = Phases()
            group.restart(*range(group.num_ranks))
            self.connect_ranks(group)
            phases.end("start")
            loads.part()
            report = loads.load(self._terms, phases, again=True)
            self._phases, self._report, self._is_out_of_step = phases, report, False
            return report.ranks[rank]

    def connect_ranks(self, group: WorkerGroup) -> None:
        """Makes one process group of torch.distributed of all ranks."""
        if group.num_ranks > 1:
            host = group.facts[0].node_ip
            port = group.ask("open_meeting", host)
            group.call("meet", host, port, keep_on_failure=True)

    def _begin(self, arguments: dict[str, Any], seed: int | None, *, streams: bool) -> Generation:
        group = self._ready()
        self._turn.acquire()
        with ExitStack() as turn:
            turn.callback(self._turn.release)
            self._refuse_out_of_step()
            generation = Generation(
                group,
                arguments,
                ticket=next(self._tickets),
                seed=secrets.randbelow(_NUM_SEEDS) if seed is None else seed,
                streams=streams,
                on_end=self._end_turn,
            )
            turn.pop_all()
            return generation

    def _refuse_out_of_step(self) -> None:
        if self._is_out_of_step:
            raise ClusterError(
                "a rank failed during a generation, and the others may wait for it for ever: restart(rank) replaces all"
            )

    def _end_turn(self, *, is_in_step: bool) -> None:
        self._is_out_of_step |= not is_in_step
        self._turn.release()


def _prepared(inputs: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the ranks; lists of token ids become tensors.

    Raises:
        SettingsError: An argument cannot be given.
    """
    refused = sorted(arguments.keys() & set(_OWN_ARGUMENTS))
    if refused:
        raise SettingsError(f"{', '.join(refused)} cannot be given to a model over several ranks; it gives token ids")
    given = arguments if inputs is None else {"inputs": inputs, **arguments}
    return {name: _as_ids(name, value) if name in _IDS else value for name, value in given.items()}


def _as_ids(name: str, value: Any) -> torch.Tensor:
    """Token ids, or a mask of them, as a tensor.

    Raises:
        SettingsError: They are none, such as a text, or lists of several lengths.
    """
    import torch

    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"{name} is a tensor of token ids, or one list of them for each sequence, all of one length, got {brief(value)}; "
            f"a tokenizer makes them of text: {first_line(error)}"
        ) from error
