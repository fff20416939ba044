"""What does a worker of the engine hold? Mixed into vLLM's worker by `worker_extension_cls`, and asked by `collective_rpc`."""

from __future__ import annotations

from ranks import hashes_of


class Probe:
    """Methods that every worker gets."""

    def parameter_hashes(self) -> dict[str, str]:
        return hashes_of(self.model_runner.model)

    def make_room_between_stages(self) -> None:
        """What stages of a pipeline hand over has memory from a warm-up, which vLLM 0.32 leaves out of eager engines on CPUs."""
        from vllm.distributed import get_pp_group

        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    def lose_parameters(self) -> None:
        """What sleep level 2 does on a GPU: parameters keep their addresses and lose what they hold, buffers keep it.

        What they hold then is finite: the KV cache would keep infinities, and show them after the next reload.
        """
        import torch

        for parameter in self.model_runner.model.parameters():
            parameter.data.view(torch.uint8).fill_(0x3F)
