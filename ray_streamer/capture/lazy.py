"""What does a loader get instead of a tensor of the checkpoint? A tensor that knows everything but its values.

Every operation on it comes to the recorder that made it. What its own Python methods would do with raw memory, which it has
not, is answered with real values. What loaders do for each tensor, narrow it and ask for its shape, is answered here: to pass through
torch's dispatcher takes several times as long.
"""

# pyright: reportPrivateUsage=false
# Names of a lazy tensor begin with _lazy_, since Tensor has most others; torch offers some things under private names only.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ray_streamer.capture.memory import Memory
    from ray_streamer.capture.recorder import OperationRecorder
    from ray_streamer.capture.strided import Strided


class LazyTensor(torch.Tensor):
    """A view of a memory that was not read yet. Made by `OperationRecorder`; behaves as a plain tensor without gradient."""

    # Tensor has attributes called data, names, real, grad and so on, and loaders set some of their own.
    _lazy_recorder: OperationRecorder
    _lazy_memory: Memory
    _lazy_view: Strided

    @staticmethod
    def __new__(cls: type[LazyTensor], recorder: OperationRecorder, memory: Memory, view: Strided) -> LazyTensor:
        """A view of `memory`, in elements of it."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            view.shape,
            strides=view.strides,
            storage_offset=view.offset,
            dtype=memory.dtype,
            device=memory.device,
        )
        made._lazy_recorder, made._lazy_memory, made._lazy_view = recorder, memory, view
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]  # as torch documents it

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hands the operation to the recorder of the first lazy tensor among the arguments.

        Called where the capture's own mode is not active: in a thread that it does not watch, or after it has ended.
        """
        kwargs = kwargs or {}
        lazy = next(found for found in tensors_among(args, kwargs) if isinstance(found, LazyTensor))
        return lazy._lazy_recorder.run(func, args, kwargs, is_watched=False)

    @property
    def _lazy_shadow(self) -> torch.Tensor:
        """The same view of a meta tensor, which torch's own operations take; views of it have its storage."""
        view = self._lazy_view
        return self._lazy_memory.shadow.as_strided(view.shape, view.strides, view.offset)

    def _lazy_seen(self, view: Strided) -> LazyTensor:
        return LazyTensor(self._lazy_recorder, self._lazy_memory, view)

    @property
    def shape(self) -> torch.Size:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of every tensor."""
        return torch.Size(self._lazy_view.shape)

    @property
    def ndim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of every tensor."""
        return len(self._lazy_view.shape)

    @property
    def dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of every tensor."""
        return self._lazy_memory.dtype

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As of every tensor."""
        return self._lazy_memory.device

    def dim(self) -> int:
        """As of every tensor."""
        return len(self._lazy_view.shape)

    def narrow(self, dim: Any, start: Any, length: Any) -> torch.Tensor:
        """As of every tensor; what is not plain is left to torch, as are errors."""
        view = self._lazy_view
        if type(dim) is type(start) is type(length) is int and _exists(dim, len(view.shape)):
            dim %= len(view.shape)
            if start >= 0 and length >= 0 and start + length <= view.shape[dim]:
                return self._lazy_seen(view.narrowed(dim, start, length))
        return super().narrow(dim, start, length)

    def unbind(self, dim: Any = 0) -> tuple[torch.Tensor, ...]:
        """As of every tensor."""
        view = self._lazy_view
        if type(dim) is not int or not _exists(dim, len(view.shape)):
            return super().unbind(dim)
        dim %= len(view.shape)
        return tuple(self._lazy_seen(view.selected(dim, index)) for index in range(view.shape[dim]))

    def unsqueeze(self, dim: Any) -> torch.Tensor:
        """As of every tensor."""
        view = self._lazy_view
        if type(dim) is not int or not _exists(dim, len(view.shape) + 1):
            return super().unsqueeze(dim)
        return self._lazy_seen(view.unsqueezed(dim % (len(view.shape) + 1)))

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As of every tensor; here for one number."""
        view = self._lazy_view
        if type(index) is int and view.shape and _exists(index, view.shape[0]):
            return self._lazy_seen(view.selected(0, index % view.shape[0]))
        return super().__getitem__(index)

    def _lazy_real(self) -> torch.Tensor:
        """The same view of real memory, which may be written to through it."""
        return self._lazy_recorder.real(self, is_written=True)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Names the tensor of the checkpoint, and reads nothing."""
        names = ", ".join(self._lazy_memory.tensors[:3])
        return f"LazyTensor({names}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A lazy copy."""
        copied = self.clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as a plain tensor with its values."""
        return self._lazy_real().clone().__reduce_ex__(protocol)

    def __array__(self, dtype: Any = None) -> Any:
        """A numpy array of the values."""
        return self._lazy_real().__array__(dtype)


def _exists(index: int, size: int) -> bool:
    return -size <= index < size


def tensors_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation is given, those in lists included; operations have no deeper arguments."""
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [inner for inner in value if isinstance(inner, torch.Tensor)]
    return found


def with_each(value: Any, change: Callable[[LazyTensor], Any]) -> Any:
    """An argument with each of its lazy tensors changed."""
    if isinstance(value, LazyTensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([with_each(inner, change) for inner in value])
    return value


def _with_values(name: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)

    def called(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return method(self._lazy_real(), *with_each(args, lambda lazy: lazy._lazy_real()), **kwargs)

    called.__name__, called.__doc__ = name, f"As `torch.Tensor.{name}`, of the values, which are read if need be."
    return called


RAW_ACCESS = ("numpy", "tolist", "data_ptr", "untyped_storage", "storage", "__dlpack__", "apply_", "map_")
"""Methods of a tensor that reach its memory past torch's dispatcher."""

for _name in RAW_ACCESS:
    setattr(LazyTensor, _name, _with_values(_name))
