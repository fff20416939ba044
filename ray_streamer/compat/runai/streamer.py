"""When may a stream of `runai_model_streamer` begin? Inside its `with` block, one stream after the other."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Self

from ray_streamer.arguments import whole_number
from ray_streamer.compat.runai.credentials import settings_for
from ray_streamer.compat.runai.errors import translated
from ray_streamer.compat.runai.node import NodeRanks, are_several_ranks
from ray_streamer.compat.runai.places import stores_of
from ray_streamer.compat.runai.streaming import RangeStream, StorePart, usable_device
from ray_streamer.errors import SettingsError
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    import torch

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.compat.runai.credentials import S3Credentials
    from ray_streamer.compat.runai.places import StorePaths
    from ray_streamer.settings import Settings
    from ray_streamer.storage import Storage

    MakeIndex = Callable[[Storage, StorePaths, Settings], CheckpointIndex]
    """Reads what must be known of the files of one store; called on the first rank of a node only."""


class Streamer:
    """What all streamers have in common; used by one thread."""

    def __init__(self) -> None:
        self._is_open = False
        self._stream: RangeStream | None = None
        self._taken: Iterator[tuple[str, torch.Tensor]] | None = None

    def __enter__(self) -> Self:
        self._is_open = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._end()

    def _begin(
        self,
        paths: Sequence[str],
        make_index: MakeIndex,
        choose: Callable[[Sequence[CheckpointIndex]], Sequence[tuple[str, ...]]],
        *,
        credentials: S3Credentials | None,
        device: str | None,
        is_distributed: bool,
        memory_limit: int | None,
        is_owned: bool,
    ) -> RangeStream:
        """Opens the stores of `paths`, finds out what is there, and has it streamed; reads no tensor yet.

        Args:
            paths: Of all files.
            make_index: Reads headers, or sizes.
            choose: Names of wanted rows, for each store's index.
            credentials: Of the call.
            device: Where tensors are given.
            is_distributed: Whether the ranks of this node read together.
            memory_limit: Of the call; as the settings say when unset.
            is_owned: Whether tensors stay as they are.

        Raises:
            SettingsError: The streamer is not open, or its last stream was not taken to the end.
            FileAccessError: A file is not there, or may not be read.
            CorruptedFileError: A header is malformed.
        """
        self._refuse_unready()
        if memory_limit is not None:
            memory_limit = whole_number("memory_limit", memory_limit)
        settings, on_device, stores = settings_for(credentials), usable_device(device), stores_of(paths)
        with translated(), ExitStack() as owned:
            ranks = None
            if is_distributed and are_several_ranks():
                ranks = NodeRanks.meet(settings)
                owned.callback(ranks.close)
            storages = [owned.enter_context(closing(open_storage(store.root, settings))) for store in stores]
            indices: list[CheckpointIndex] = []
            for storage, store in zip(storages, stores, strict=True):
                if ranks is None:
                    indices.append(make_index(storage, store, settings))
                else:
                    indices.append(ranks.index(lambda at=storage, of=store: make_index(at, of, settings)))
            chosen = choose(indices)
            # It refuses a limit: until then the stores and the other ranks are let go of here.
            stream = RangeStream(
                parts=[StorePart(*part) for part in zip(storages, indices, chosen, strict=True)],
                settings=settings,
                memory_limit=settings.memory_limit if memory_limit is None else memory_limit,
                device=on_device,
                is_owned=is_owned,
                ranks=ranks,
            )
            stream.owned.push(owned.pop_all())
        self._stream = stream
        return stream

    def _take(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the stream; nothing where there is none, or no more."""
        if not self._is_open:
            raise SettingsError("the streamer is not open: use it inside its with block")
        stream, self._taken = self._stream, None
        if stream is None:
            return
        try:
            with translated():
                yield from stream
        finally:
            if self._stream is stream:
                self._stream = None
                stream.owned.close()

    def _refuse_unready(self) -> None:
        if not self._is_open:
            raise SettingsError("the streamer is not open: begin with `with SafetensorsStreamer() as streamer:`")
        if self._stream is not None:
            raise SettingsError(
                "the stream that was begun before has not been taken to its end: take it, or close its iterator, before the next"
            )

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.owned.close()
