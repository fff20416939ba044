"""One engine: loads, answers, and says what its workers hold, on standard output."""

from __future__ import annotations

import json
from typing import Any

PROMPTS = [[5, 17, 250, 3, 99], [1, 2, 3], [280, 281, 7, 7, 7, 42]]


def main(wish: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=4,
        worker_extension_cls="probe.Probe",
        **wish["engine"],
    )
    try:
        llm.collective_rpc("make_room_between_stages")
        said = state_of(llm, SamplingParams)
        said["later"] = [after(llm, calls, SamplingParams) for calls in wish.get("later", [])]
        print("ANSWER " + json.dumps(said), flush=True)
    finally:
        # Not when the interpreter ends: an engine that had an error is still waited for then.
        llm.llm_engine.engine_core.shutdown()


def after(llm: Any, calls: list[tuple[str, dict[str, Any]]], sampling: Any) -> dict[str, Any]:
    """What the engine says after these calls of its workers' methods, with the errors of those that failed, by number."""
    errors = {}
    for number, (method, arguments) in enumerate(calls):
        try:
            llm.collective_rpc(method, kwargs=arguments)
        except Exception as raised:
            errors[number] = str(raised)
    return state_of(llm, sampling) | {"errors": errors}


def state_of(llm: Any, sampling: Any) -> dict[str, Any]:
    """Its answers, and hashes of what each worker holds."""
    return {"answers": answers_of(llm, sampling), "hashes": llm.collective_rpc("parameter_hashes")}


def answers_of(llm: Any, sampling: Any) -> list[Any]:
    parameters = sampling(temperature=0, max_tokens=8, logprobs=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], parameters, use_tqdm=False)
    return [
        [
            list(output.outputs[0].token_ids),
            [round(next(iter(step.values())).logprob, 4) for step in output.outputs[0].logprobs],
        ]
        for output in outputs
    ]
