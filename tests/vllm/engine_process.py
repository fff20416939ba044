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
    said = {"answers": answers_of(llm, SamplingParams), "hashes": llm.collective_rpc("parameter_hashes")}
    for reload in wish.get("reloads", []):
        error = None
        try:
            llm.collective_rpc("reload_weights", kwargs=reload)
        except Exception as raised:
            error = str(raised)
        said.setdefault("reloaded", []).append(
            {
                "answers": answers_of(llm, SamplingParams),
                "hashes": llm.collective_rpc("parameter_hashes"),
                "error": error,
            }
        )
    print("ANSWER " + json.dumps(said), flush=True)


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
