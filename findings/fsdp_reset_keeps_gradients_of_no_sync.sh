#!/usr/bin/env bash
# After an error amid a step FSDP2's reset_iter_state() is to throw away the step's gradients, and says in its own words
# that those which accumulate without synchronisation go too. In torch 2.13.0 they stay, out of reach of zero_grad(), and
# are added to the next step: a step repeated after an error has the gradient of the failed one as well. Where gradients
# were synchronised, zero_grad() does throw them away.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.4

cat > reset.py <<'PYTHON'
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.FileStore("store", 1), rank=0, world_size=1)
says = "no_sync" in " ".join((FSDPModule.reset_iter_state.__doc__ or "").split())


def repeated(synchronises: bool, policy: MixedPrecisionPolicy) -> float:
    """The gradient of a step after an error, in gradients of that step alone."""
    model = torch.nn.Linear(4, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    model.set_force_sum_reduction_for_comms(True)
    rows = torch.ones(1, 4)
    model.set_requires_gradient_sync(synchronises)
    model(rows).sum().backward()  # the first microbatch of a step whose second one raises an error
    model.reset_iter_state()
    model.zero_grad()
    model.set_requires_gradient_sync(True)
    model(rows).sum().backward()  # the step again
    return model.weight.grad.full_tensor().mean().item()


plain, mixed = MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
found = {
    "synchronised": repeated(True, plain),
    "not, float32": repeated(False, plain),
    "not, bfloat16 with sums in float32": repeated(False, mixed),
}
print("torch", torch.__version__, "; its docstring names no_sync:", says)
for name, gradients in found.items():
    print(f"{name}: {gradients:.0f} gradient(s) after the reset")
sys.exit(0 if says and list(found.values()) == [1.0, 2.0, 2.0] else "it has changed")
PYTHON
venv/bin/python reset.py
