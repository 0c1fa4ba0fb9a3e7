"""Started by test_two_processes.py: two gloo processes train every family on halves of the groups, under DDP and FSDP2.

Process 0 has its groups in three micro-batches, process 1 in two and an empty one. Process 0 writes the gaps to the
untouched model's gradient, as JSON, into the folder named on the command line.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from families import CONFIGS, expected, gradient_gap, gradients, mixed_loss, trained_model
from torch.nn.parallel import DistributedDataParallel

from kilter.models.adapters import load_adapter
from kilter.models.build import policy_trunk
from kilter.models.load import whole
from kilter.models.roles import Lora
from kilter.models.save import save_causal_lm
from kilter.models.shard import shard
from kilter.models.trunk import Trunk
from kilter.tree import Batch, empty_batch, make_batch

WORLD = 2
WAYS = ("ddp", "ddp-checkpointed", "fsdp2", "fsdp2-checkpointed")


def my_batches(family: str, rank: int) -> list[Batch]:
    groups = expected(family)[0]
    if rank == 0:
        return [make_batch([groups[0:4]]), make_batch([groups[4:6], groups[6:7]]), make_batch([groups[7:9]])]
    batches = [make_batch([groups[9:12]]), make_batch([groups[12:14], groups[14:16]])]
    return [*batches, empty_batch(batches[0])]


def run(family: str, rank: int, *, sharded: bool, checkpointing: bool) -> tuple[float, str]:
    model = trained_model(family)
    trunk = policy_trunk(model)
    trunk.set_checkpointing(checkpointing)
    wrapped = shard(trunk) if sharded else DistributedDataParallel(trunk)
    for batch in my_batches(family, rank):
        (WORLD * mixed_loss(wrapped, batch)).backward()  # both wrappers average over processes
    ours = {name: whole(grad) for name, grad in gradients(model).items()}
    return gradient_gap(ours, expected(family)[2])


def saving(folder: Path) -> tuple[float, str]:
    """A sharded policy with an adapter, saved and loaded: the largest difference of a logit, a tenth of it."""
    lora, tokens = Lora(3), torch.tensor([[5, 6, 7, 8]])
    trunk = policy_trunk(trained_model("llama"), lora=lora, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in trunk.parameters_of("policy"):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        with trunk.acting_as("policy") as model:
            wanted = model(tokens).logits
    save_causal_lm(shard(trunk), "policy", folder / "result", Words())
    dist.barrier()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "result").eval()
    again = Trunk({"base": trained_model("llama")}, {})
    load_adapter(again, "policy", folder / "result" / "adapter", model="base")
    with torch.no_grad(), again.acting_as("policy") as model:
        gap = max(float((other(tokens).logits - wanted).abs().max()) for other in (plain, model))
    return gap / 10, "saved"  # logits are some tens, gradients are compared relatively


class Words:
    """A tokenizer with nothing to save."""

    def save_pretrained(self, folder: Path) -> None:
        """Nothing."""


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for way in WAYS:
        options = {"sharded": "fsdp2" in way, "checkpointing": "checkpointed" in way}
        found[way] = {family: run(family, rank, **options) for family in CONFIGS}
    found["saved"] = {"llama": saving(Path(folder))}
    if rank == 0:
        Path(folder, "gaps.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # Forked, so that the imports are paid once; nothing has run on a thread of torch yet.
    torch.multiprocessing.start_processes(main, args=(sys.argv[1],), nprocs=WORLD, start_method="fork")
