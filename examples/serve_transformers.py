"""A model of transformers behind Ray Serve, over several ranks. Needs `pip install ".[serve,transformers]"`.

    serve run --working-dir . examples.serve_transformers:app uri=s3://bucket/llama tp=8 device=cuda
    curl localhost:8000 -d '{"prompt": [1, 15043, 3186], "max_new_tokens": 8}'
    curl -N localhost:8000 -d '{"prompt": [1, 15043, 3186], "max_new_tokens": 8, "stream": true}'

Start it in the clone's folder: `--working-dir .` brings this file to every node.

A prompt is a list of token ids. The answer is one JSON object with the new ones; streamed, it is one token id per line.
A request that asks for something else gets status 400 and a sentence. When a rank dies, the model is loaded again, and the request
goes on with its next token. The device is cpu by default. A replica needs a CPU for itself and a CPU for each rank, on cuda a GPU, too; Serve
waits for nodes that have them.
"""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.responses import JSONResponse, StreamingResponse

import ray_streamer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator

    from starlette.requests import Request

MOST_RESTARTS = 2


class BadRequestError(Exception):
    """What is wrong with a request, in a sentence for the client."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    prompt: list[int]
    num_tokens: int = 32
    is_streamed: bool = False

    @classmethod
    def of(cls, body: bytes, num_token_ids: int) -> Asked:
        """Reads the body of a request to a model with token ids below `num_token_ids`.

        Raises:
            BadRequestError: It is no such request; says what is expected.
        """
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise BadRequestError('the body must be a JSON object, such as {"prompt": [1, 15043, 3186]}')
        prompt, num_tokens, is_streamed = said.get("prompt"), said.get("max_new_tokens", 32), said.get("stream", False)
        if not isinstance(prompt, list) or not prompt:
            raise BadRequestError("prompt must be a list of token ids, with at least one")
        if not all(type(token) is int and 0 <= token < num_token_ids for token in prompt):
            raise BadRequestError(
                f"prompt must hold whole numbers from 0 to {num_token_ids - 1}, the token ids of this model"
            )
        if type(num_tokens) is not int or num_tokens < 1:
            raise BadRequestError("max_new_tokens must be a whole number of at least 1")
        if not isinstance(is_streamed, bool):
            raise BadRequestError("stream must be true or false")
        return cls(prompt, num_tokens, is_streamed)


@serve.deployment
class Model:
    """One replica: it takes the first bundle of its placement group, and its ranks take the others."""

    def __init__(self, uri: str, tp: int, device: str) -> None:
        self._model: Any = ray_streamer.load_sharded(uri, tp, bootstrap="transformers", device=device)
        self._num_token_ids: int = self._model.run(lambda context: context.model.config.get_text_config().vocab_size)[0]
        self._restarting = threading.Lock()

    async def __call__(self, request: Request) -> Any:
        """Answers one prompt; others wait for their turn."""
        try:
            asked = Asked.of(await request.body(), self._num_token_ids)
        except BadRequestError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        tokens = self._tokens(asked.prompt, asked.num_tokens)
        if asked.is_streamed:
            return StreamingResponse(self._lines(tokens), media_type="text/plain")
        return {"tokens": await asyncio.to_thread(list, tokens)}

    async def _lines(self, tokens: Generator[int]) -> AsyncIterator[str]:
        own_thread = ThreadPoolExecutor(1)
        try:
            while (token := await asyncio.wrap_future(own_thread.submit(next, tokens, None))) is not None:
                yield f"{token}\n"
        finally:  # also when the client goes away: the generation ends with its next token
            own_thread.submit(tokens.close)
            own_thread.shutdown(wait=False)

    def _tokens(self, prompt: list[int], num_tokens: int) -> Generator[int]:
        told: list[int] = []
        for num_restarts in range(MOST_RESTARTS + 1):
            try:
                for token in self._model.stream(
                    [prompt + told], max_new_tokens=num_tokens - len(told), do_sample=False
                ):
                    told.append(token)
                    yield token
            except ray_streamer.ClusterError:  # RankFailedError is one
                if len(told) == num_tokens:
                    return
                if num_restarts == MOST_RESTARTS or not self._model.needs_restart:
                    raise
                with self._restarting:  # the first request that noticed does it for all
                    if self._model.needs_restart:
                        self._model.restart(0)
            else:
                return

    def __del__(self) -> None:
        if hasattr(self, "_model"):  # a load that failed leaves none
            self._model.shutdown()


def app(args: dict[str, str]) -> serve.Application:
    """What `serve run` starts."""
    tp, device = int(args["tp"]), args.get("device", "cpu")
    rank = {"CPU": 1.0} if device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
    placed = Model.options(
        ray_actor_options={"num_cpus": 1},
        placement_group_bundles=[{"CPU": 1.0}, *[rank] * tp],
        max_ongoing_requests=100,
    )
    return placed.bind(args["uri"], tp, device)
