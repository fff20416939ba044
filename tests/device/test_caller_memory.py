"""Whatever state torch is in, and whatever kind of tensor the caller gives, memory is filled with the right bytes or refused by name."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import ray_streamer
from ray_streamer.device.caller_memory import refuse_overlaps, refuse_unwritable, writable_alias
from ray_streamer.errors import DeviceError, SettingsError

RULES = {"*": ray_streamer.Replicate()}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 0,
    "vocab_size": 130,
}


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "lm_head.weight": torch.randn(130, 64, generator=generator),
        "norm.weight": torch.randn(64, generator=generator),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path), tensors


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def _check(tensors, expected, dtype=torch.float32):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].device.type == "cpu"
        assert torch.equal(tensors[name].detach(), tensor.to(dtype))


CONTEXTS = {
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "cpu": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("page_cache", ["on", "off"])
def test_device_cpu_is_host_memory_in_every_context(folder, context, dtype, page_cache):
    uri, expected = folder
    settings = ray_streamer.Settings.resolve(page_cache=page_cache)
    with context():
        tensors = ray_streamer.load_rank(uri, rules=RULES, dtype=dtype, settings=settings)
    _check(tensors, expected, torch.bfloat16 if dtype else torch.float32)


def test_default_device_and_dtype_of_torch_change_nothing(folder, default_device, default_dtype):
    uri, expected = folder
    default_device("meta")
    default_dtype(torch.float64)
    _check(ray_streamer.load_rank(uri, rules=RULES), expected)
    _check(dict(ray_streamer.stream_rank(uri, rules=RULES)), expected)
    padded = ray_streamer.load_rank(uri, layout="vllm", rank=1, world_size=2, local_world_size=1)
    assert padded["lm_head.weight"].shape == (96, 64)
    assert not padded["lm_head.weight"][34:].any()


def _inference_tensor(shape, dtype):
    with torch.inference_mode():
        return torch.zeros(shape, dtype=dtype)


MAKERS = {
    "parameter": lambda shape, dtype: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)),
    "requires-grad": lambda shape, dtype: torch.zeros(shape, dtype=dtype, requires_grad=True),
    "buffer": lambda shape, dtype: torch.nn.Buffer(torch.zeros(shape, dtype=dtype)),
    "inference-tensor": _inference_tensor,
    "subclass-of-parameter": lambda shape, dtype: type("Weight", (torch.nn.Parameter,), {})(
        torch.zeros(shape, dtype=dtype)
    ),
    "view-of-a-parameter": lambda shape, dtype: torch.nn.Parameter(torch.zeros((3, *shape), dtype=dtype))[1],
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tensors_that_autograd_minds_are_filled_with_every_option(folder, make, dtype, context):
    uri, expected = folder
    target_dtype = torch.bfloat16 if dtype else torch.float32
    out = {name: make(tuple(tensor.shape), target_dtype) for name, tensor in expected.items()}
    requires_grad = {name: tensor.requires_grad for name, tensor in out.items()}
    with context():
        tensors = ray_streamer.load_rank(uri, rules=RULES, out=out, dtype=dtype)
    _check(out, expected, target_dtype)
    for name, tensor in tensors.items():
        assert tensor is out[name]
        assert tensor.requires_grad == requires_grad[name]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_rows_of_padding_are_zeroed_in_them_too(folder, make):
    uri, expected = folder
    target = make((96, 64), torch.float32)
    writable_alias(target).fill_(7)
    part = {"rank": 1, "world_size": 2, "local_world_size": 1}
    ray_streamer.load_rank(uri, layout="vllm", out={"lm_head.weight": target}, **part)
    assert torch.equal(target.detach()[:34], expected["lm_head.weight"][96:])
    assert not target.detach()[34:].any()


STRIDED = {
    "transposed": lambda memory, shape: memory[: shape[0] * shape[1]].view(shape[1], shape[0]).T,
    "column-block": lambda memory, shape: memory.view(-1, 2 * shape[1])[: shape[0], shape[1] : 2 * shape[1]],
    "every-other-row": lambda memory, shape: memory.view(-1, 2, shape[1])[: shape[0], 1],
    "every-other-element": lambda memory, shape: memory.view(-1, shape[1], 2)[: shape[0], :, 1],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_of_any_strides_are_filled_and_nothing_beside_them(folder, view, dtype, rank):
    """The last rank's vocabulary ends in padding, which is zeroed; what lies between the rows of a view is not the load's."""
    uri, expected = folder
    memory = torch.full((96 * 2 * 64,), 7, dtype=torch.bfloat16 if dtype else torch.float32)
    target = view(memory, (96, 64))
    tensors = ray_streamer.load_rank(
        uri,
        layout="vllm",
        out={"lm_head.weight": target},
        dtype=dtype,
        rank=rank,
        world_size=2,
        local_world_size=1,
    )
    assert tensors["lm_head.weight"] is target
    wanted = torch.zeros(96, 64)
    own = expected["lm_head.weight"][96 * rank :][:96]
    wanted[: len(own)] = own
    assert torch.equal(target.detach(), wanted.to(memory.dtype))
    is_beside = torch.ones(memory.shape, dtype=torch.bool)
    view(is_beside, (96, 64)).fill_(False)
    assert bool((memory[is_beside] == 7).all())


def test_a_tied_models_state_dict_is_filled_although_the_file_has_one_name(folder):
    uri, expected = folder
    model = torch.nn.Module()
    model.embed_tokens = torch.nn.Embedding(130, 64)
    model.lm_head = torch.nn.Linear(64, 130, bias=False)
    model.norm = torch.nn.LayerNorm(64, bias=False)
    model.embed_tokens.weight = model.lm_head.weight
    tensors = ray_streamer.load_rank(uri, rules=RULES, out=model.state_dict())
    assert tensors.keys() == expected.keys()
    assert torch.equal(model.embed_tokens.weight.detach(), expected["lm_head.weight"])
    assert torch.equal(model.norm.weight.detach(), expected["norm.weight"])


def test_a_name_that_is_no_second_name_is_refused(folder):
    uri, _ = folder
    weight = torch.zeros(130, 64)
    out = {
        "lm_head.weight": weight,
        "part": weight[:65],
        "other": torch.zeros(130, 64),
        "as_ints": weight.view(torch.int32),
    }
    with pytest.raises(DeviceError, match="does not hold: as_ints, other, part"):
        ray_streamer.load_rank(uri, rules=RULES, out=out)


@pytest.mark.parametrize("start", [0, 1, 63], ids=["same-memory", "shifted", "last-element"])
def test_tensors_that_share_memory_are_refused(tmp_path, start):
    save_file({"a": torch.ones(64), "b": torch.ones(64)}, tmp_path / "model.safetensors")
    memory = torch.zeros(200)
    out = {"a": memory[:64], "b": memory[start : start + 64]}
    with pytest.raises(DeviceError, match=r"out\['a'\] and out\['b'\] share memory, and the checkpoint holds both"):
        ray_streamer.load_rank(str(tmp_path), rules=RULES, out=out)
    assert not memory.any()
    ray_streamer.load_rank(str(tmp_path), rules=RULES, out={"a": memory[:64], "b": memory[64:128]})
    assert memory[:128].all()


SHARING = {
    "columns": lambda memory: (memory.view(8, 8)[:, :5], memory.view(8, 8)[:, 4:]),
    "rows-of-columns": lambda memory: (memory.view(8, 8)[:, 3:5], memory[8:16].view(8, 1)),
    "transposed": lambda memory: (memory[:6].view(2, 3).T, memory[5:11].view(3, 2)),
    "the-same": lambda memory: (memory.view(8, 8)[:, :2], memory.view(8, 8)[:, :2]),
    "two-dtypes": lambda memory: (memory.view(8, 8)[:, :2], memory.view(torch.bfloat16).view(8, 16)[:, 3:5]),
}


@pytest.mark.parametrize("views", SHARING.values(), ids=SHARING.keys())
def test_tensors_with_strides_that_share_memory_are_refused(views):
    one, other = views(torch.zeros(64))
    between = torch.zeros(64).view(8, 8)
    with pytest.raises(DeviceError, match=r"out\['a'\] and out\['b'\] share memory"):
        refuse_overlaps({"x": between[:, ::2], "a": one, "b": other, "y": between[:, 1::2]})


def test_tensors_between_each_others_elements_share_nothing():
    memory = torch.zeros(8, 8)
    refuse_overlaps({f"column {at}": memory[:, at] for at in range(8)})
    refuse_overlaps({"left": memory[:, :3], "middle": memory[:, 3:4], "right": memory.T[4:]})


def test_views_that_repeat_their_elements_are_refused(folder):
    uri, _ = folder
    with pytest.raises(DeviceError, match="give a contiguous tensor"):
        ray_streamer.load_rank(uri, rules=RULES, out={"norm.weight": torch.zeros(1).expand(64)})


def test_neighbours_in_memory_and_empty_tensors_do_not_overlap():
    memory = torch.zeros(3, 8)
    refuse_overlaps({"a": memory[0], "b": memory[2], "c": memory[1], "d": memory[:0], "e": memory[0, :0]})


def _dtensor():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Replicate as Whole

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        return DTensor.from_local(torch.zeros(64), mesh, [Whole()])
    finally:
        torch.distributed.destroy_process_group()


def _freed():
    tensor = torch.zeros(64)
    tensor.untyped_storage().resize_(0)
    return tensor


def _fake():
    with FakeTensorMode():
        return torch.zeros(64)


REFUSED = {
    "dtensor": (_dtensor, r"is a DTensor, not plain memory; give norm.weight.to_local\(\)"),
    "fake": (_fake, "is a FakeTensor, not plain memory"),
    "sparse": (lambda: torch.zeros(64).to_sparse(), "is sparse_coo; give a dense tensor"),
    "conjugated": (lambda: torch.zeros(64, dtype=torch.complex64).conj(), "is a conjugated or negated view"),
    "negated": (lambda: torch.zeros(64, dtype=torch.complex64).conj().imag, "is a conjugated or negated view"),
    "freed": (_freed, "has no memory: its storage was freed"),
    "nested": (lambda: torch.nested.as_nested_tensor(torch.zeros(2, 64)), "is nested; give the plain tensor"),
    "array": (lambda: torch.zeros(64).numpy(), "must be a torch.Tensor, got ndarray"),
    "nothing": (lambda: None, "must be a torch.Tensor, got NoneType"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_plain_memory_is_refused_by_name(folder, make, message):
    uri, _ = folder
    with pytest.raises(DeviceError, match=r"out\['norm.weight'\] " + message):
        ray_streamer.load_rank(uri, rules=RULES, out={"norm.weight": make()})


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize], ids=["vmap", "functionalize"])
def test_tensors_that_torch_func_makes_are_refused(transform):
    def refused(tensor):
        with pytest.raises(DeviceError, match=r"torch.func without memory of its own"):
            refuse_unwritable("norm.weight", tensor)
        return tensor

    transform(refused)(torch.zeros(2, 64))


def test_names_of_given_tensors_are_text(folder):
    uri, _ = folder
    with pytest.raises(SettingsError, match="a name that is int"):
        ray_streamer.load_rank(uri, rules=RULES, out={5: torch.zeros(64)})


def test_an_empty_tensor_needs_no_memory():
    refuse_unwritable("empty", torch.zeros(0, 3))


def test_loading_in_a_mode_without_memory_is_refused(folder):
    uri, _ = folder
    with FakeTensorMode(), pytest.raises(DeviceError, match="torch makes FakeTensors here"):
        ray_streamer.load_rank(uri, rules=RULES)


def test_an_alias_may_be_written_from_a_thread_that_knows_no_mode():
    with torch.inference_mode():
        tensor = torch.zeros(4, 6)[1:3]
        alias = writable_alias(tensor)
    thread = threading.Thread(target=lambda: writable_alias(tensor).add_(1))
    thread.start()
    thread.join()
    alias.add_(1)
    assert (tensor == 2).all()
    assert not alias.is_inference()
    assert (alias.data_ptr(), alias.stride()) == (tensor.data_ptr(), tensor.stride())
