"""Hostile config.json and index json from a seed, and what must become of each: a plan, or one typed error.

python tests/checkpoint/fuzz_support/mutations.py configs 100000        the counts that were reported; minutes
python tests/checkpoint/fuzz_support/mutations.py indices 10000

As a program it also watches what a test does not: CPU seconds of the slowest, and memory, by a limit on address space.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import ray_streamer
from ray_streamer import Settings
from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.errors import RayStreamerError
from ray_streamer.storage import open_storage
from ray_streamer.storage.memory import MemoryStorage
from ray_streamer.testing.checkpoints import TensorSpec, serialize_header

if TYPE_CHECKING:
    from collections.abc import Callable

SETTINGS = Settings.resolve(memory_limit="1MiB", block_bytes="64KiB")
INDEX = "model.safetensors.index.json"
LONGEST_MESSAGE = 20_000

_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
_EXPERTS = ("w1", "w2", "w3")
_COUNTS: list[Any] = [0, -1, 1, 2, 3, 4, 7, 64, 10**8, 10**9, 2**31, 2**63, 2**64, 2**70, 10**400, -(2**63), 1e9, 1e308]
_OTHERS: list[Any] = [
    None, True, False, "", "2", "llama", "\x1b[2J", "\ud800", "x" * 5000, "9" * 5000, float("nan"), float("inf"), 1.5,
    [], [4], [[4]], list(range(300)), ["full_attention"] * 50, {}, {"1": {"num_key_value_heads": 2}}, {"9" * 99: {}},
    {"bits": 4, "group_size": 32}, {"config_groups": {"g": {"weights": {"num_bits": 0, "group_size": -1}}}},
]  # fmt: skip
_KEYS = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "vocab_size",
    "num_local_experts", "num_experts", "n_routed_experts", "num_nextn_predict_layers", "layer_types", "per_layer_config",
    "attention_k_eq_v", "num_global_key_value_heads", "text_config", "quantization_config", "compression_config",
    "tie_word_embeddings", "architectures", "n_layer", "n_head", "n_embd", "num_kv_heads", "multi_query",
    "new_decoder_architecture", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "weight_block_size",
)  # fmt: skip
_MODEL_TYPES = (
    "llama", "mixtral", "deepseek_v3", "kimi_k2", "gemma4_text", "gemma3", "gemma4", "qwen3_next", "qwen3_moe", "gpt2",
    "falcon", "phi3", "gpt_oss", "granitemoe", "llama4", "glm4_moe", "bloom", "gpt_neox", "mistral3", "deepseek_v2",
)  # fmt: skip
_MESHES: list[dict[str, Any]] = [
    {"tp": 2}, {"tp": 1, "pp": 2}, {"tp": 2, "ep": True}, {"tp": 2, "mtp": True, "unmatched": "replicate"},
    {"tp": 2, "layout": "vllm"}, {"tp": 2, "layout": "transformers", "unmatched": "replicate"}, {"tp": 1, "pp": [1, 1]},
]  # fmt: skip


def shard(names: list[str], *, dtype: str = "U8", shape: tuple[int, ...] = (64, 64)) -> bytes:
    """A file of equal tensors."""
    specs = [TensorSpec(name, dtype, shape) for name in names]
    return serialize_header(specs) + bytes(sum(spec.num_bytes for spec in specs))


def tensor_names() -> list[str]:
    """Names with which many families have something to do."""
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "mtp.fc.weight"]
    for number in range(2):
        prefix = f"model.layers.{number}"
        names += [f"{prefix}.{module}.weight" for module in _LAYERS]
        names += [f"{prefix}.block_sparse_moe.experts.{e}.{w}.weight" for e in range(4) for w in _EXPERTS]
        names += [f"{prefix}.mlp.experts.{e}.down_proj.weight" for e in range(4)]
        names += [
            f"{prefix}.mlp.experts.gate_up_proj",
            f"{prefix}.self_attn.q_proj.weight_scale",
            f"h.{number}.attn.c_attn.weight",
        ]
        names += [f"{prefix}.self_attn.qkv_proj.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
        names += [f"{prefix}.mlp.gate.weight_packed", f"{prefix}.mlp.gate.weight_scale", f"{prefix}.mlp.x_blocks"]
    return names


def hostile_config(rng: random.Random) -> bytes:
    """One config.json."""
    count = rng.choice((2, 4))
    config: dict[str, Any] = {
        "model_type": rng.choice(_MODEL_TYPES),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": count,
        "vocab_size": 64,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    }
    if rng.random() < 0.3:
        config = {"model_type": config["model_type"], "text_config": config}
    for _ in range(rng.randint(1, 4)):
        config = _mutate(rng, config)
    text = json.dumps(config)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
        text = _garble(rng, text)
    return text.encode("utf-8", "surrogatepass")


def _mutate(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    target = config
    while rng.random() < 0.4 and (inner := [value for value in target.values() if isinstance(value, dict)]):
        target = rng.choice(inner)
    key = rng.choice((rng.choice(_KEYS), rng.choice([*target] or ["x"])))
    kind = rng.random()
    if kind < 0.1:
        target.pop(key, None)
    elif kind < 0.5:
        target[key] = rng.choice(_COUNTS)
    elif kind < 0.9:
        target[key] = copy.deepcopy(rng.choice(_OTHERS))
    else:
        value: Any = rng.choice(_COUNTS)
        for _ in range(rng.choice((2, 50, 200, 3000))):
            value = {key: value} if rng.random() < 0.5 else [value]
            if not isinstance(value, dict | list):
                break
        target[key] = _bounded(value)
    return config


def _bounded(value: Any) -> Any:
    """As deep as Python's writer can go; what is deeper is made of text in `_garble`."""
    depth, inner = 0, value
    while isinstance(inner, dict | list) and inner:
        inner = next(iter(inner.values())) if isinstance(inner, dict) else inner[0]
        depth += 1
        if depth == 400:
            return 7
    return value


def _garble(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            text[:at],
            text[:at] + rng.choice('{}[]",:0123456789eE-+.\\\0\x1bN') + text[at:],
            text[:at] + text[at + 1 :],
            text[:at] + text[at // 2 :],
            text.replace(":", ":" + "[" * 5000, 1),
            text.replace("2", "2" * rng.choice((20, 400, 5000)), 1),
            text.replace("2", rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "-0", "1e5")), 1),
        )
    )


def hostile_index(rng: random.Random) -> bytes:
    """One index json of files `1.safetensors` to `3.safetensors`."""
    names = tensor_names()
    files = [f"{number}.safetensors" for number in (1, 2, 3)]
    weight_map: dict[str, Any] = {name: files[position % 3] for position, name in enumerate(names)}
    odd = [
        "./1.safetensors", "././2.safetensors", "../1.safetensors", "/etc/passwd.safetensors", "sub/../1.safetensors", "",
        "s3://b/x.safetensors", "~/1.safetensors", "4.safetensors", "1.bin", "1.safetensors\n", "\x1b[2J.safetensors",
        "a" * 5000 + ".safetensors", "1\\.safetensors", "sub/1.safetensors", 7, None, [], {}, "\ud800.safetensors",
        "x/" * 2000 + "1.safetensors",
    ]  # fmt: skip
    for _ in range(rng.randint(1, 5)):
        name = rng.choice(names)
        kind = rng.random()
        if kind < 0.3:
            weight_map[name] = rng.choice(files)
        elif kind < 0.5:
            weight_map.pop(name, None)
        elif kind < 0.7:
            weight_map[rng.choice(("extra.weight", "\x1b[31m", "x" * 9999, "\ud800", ""))] = rng.choice(files)
        elif kind < 0.85:
            weight_map[name] = rng.choice(odd)
    whole: Any = {"metadata": rng.choice(({}, {"total_size": 2**70}, [], None)), "weight_map": weight_map}
    if rng.random() < 0.1:
        whole = rng.choice(
            (
                [],
                {},
                {"weight_map": []},
                {"weight_map": {}},
                7,
                {"weight_map": weight_map["lm_head.weight"]} if "lm_head.weight" in weight_map else None,
            )
        )
    text = json.dumps(whole)
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        text = _garble(rng, text)
    return text.encode("utf-8", "surrogatepass")


def plan_config(data: bytes, rng: random.Random) -> str:
    """Plans with one config.json; the name of the error's class, or "plan"."""
    uri = "memory://fuzz-config"
    MemoryStorage.put(uri, {"config.json": data})
    place = rng.choice(("", "/model.safetensors"))
    # Without it, nearly every case would end with the tensors that are another family's.
    mesh = rng.choice(_MESHES) | ({"unmatched": "replicate"} if rng.random() < 0.8 else {})
    return _outcome(lambda: ray_streamer.plan(uri + place, settings=SETTINGS, **mesh))


def open_index(data: bytes, rng: random.Random) -> str:
    """Opens with one index json; the name of the error's class, or "plan"."""
    uri = "memory://fuzz-index"
    MemoryStorage.put(uri, {INDEX: data})

    def run() -> None:
        storage = open_storage(uri, SETTINGS)
        try:
            index = open_checkpoint(uri, storage, strict_index=rng.random() < 0.3)
        finally:
            storage.close()
        assert {file.path for file in index.files} <= {
            "1.safetensors",
            "2.safetensors",
            "3.safetensors",
            "sub/1.safetensors",
        }
        assert len(set(index.names)) == len(index)

    return _outcome(run)


def _outcome(run: Callable[[], object]) -> str:
    try:
        run()
    except RayStreamerError as error:
        text = str(error)
        assert len(text) < LONGEST_MESSAGE, text[:500]
        assert all(line.isprintable() for line in text.split("\n")), repr(text[:500])
        text.encode("utf-8")
        return type(error).__name__
    return "plan"


def put_files() -> None:
    """What all mutations are tried on."""
    names = tensor_names()
    MemoryStorage.put("memory://fuzz-config", {"model.safetensors": shard(names)})
    # One tensor is in two files.
    parts = {f"{number}.safetensors": shard(names[number - 1 :: 3] + ["both"] * (number > 1)) for number in (1, 2, 3)}
    MemoryStorage.put("memory://fuzz-index", parts | {"sub/1.safetensors": shard(["sub"])})


KINDS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[bytes, random.Random], str]]] = {
    "configs": (hostile_config, plan_config),
    "indices": (hostile_index, open_index),
}


def run(kind: str, num_cases: int, seed: int) -> tuple[Counter[str], float]:
    """Tries `num_cases`; how often which outcome came, and the CPU seconds of the slowest."""
    make, attempt = KINDS[kind]
    put_files()
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(num_cases):
        rng = random.Random(f"{seed}-{number}")
        data = make(rng)
        began = time.process_time()
        try:
            outcomes[attempt(data, rng)] += 1
        except BaseException as error:
            error.add_note(f"case {number} of seed {seed}: {data[:2000]!r}")
            raise
        slowest = max(slowest, time.process_time() - began)
    return outcomes, slowest


def main() -> None:
    """Prints what came of it."""
    kind, num_cases, seed = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    run(kind, 200, seed)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    # Beyond what the program is by now: 64 MiB for a case, or it dies of MemoryError; and stacks of threads.
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20) + (160 << 20), -1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, slowest = run(kind, num_cases, seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{kind}: {num_cases} cases of seed {seed}, slowest {slowest:.2f} s of CPU, {grown:.1f} MiB more memory, {dict(outcomes)}"
    )


if __name__ == "__main__":
    main()
