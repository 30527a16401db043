"""The contract for every policy that compresses on the token grid, beside the two in the matrix.

Left out are the checks that say the same for every policy (extras, overrides, compilation) and those that ask
for equal choices from rounded scores (bfloat16, autocast).
"""

from functools import partial

import pytest
import torch

from memzoo.layers import build_mixer
from memzoo.layers.policies import PRESETS, make_policy
from memzoo.testing import (
    Subject,
    check_bites,
    check_causality,
    check_flops,
    check_gradients,
    check_packing,
    check_padding,
    check_restart,
    check_rows,
    check_size,
    check_streaming,
    check_value,
)

HEADS = {"type": "policy_attention", "d_model": 10, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
HEADS |= {"gate_width": 7, "gate_bias": 1.0}
POLICIES = {
    "streaming_llm": {"budget": 6, "n_sink": 2, "rerotate": True, "interval": 2},
    "h2o": {"budget": 6, "interval": 3},
    "h2o, merged": {"budget": 5, "merge": True},
    "snapkv": {"budget": 6, "window": 3, "kernel": 3, "interval": 2},
    "snapkv, adaptive": {"budget": 6, "window": 2, "kernel": 3, "adaptive": True, "interval": 3},
    "tova": {"budget": 5},
    "pyramidkv": {"budget": 6, "window": 2, "kernel": 3, "interval": 4, "prefill": "grid"},
    "key_norm": {"budget": 5, "sinks": 1},
    "keydiff": {"budget": 5, "interval": 2},
    "d2o": {"budget": 8, "n_sink": 2, "interval": 3},
    "kvmerger": {"budget": 6, "sinks": 1, "interval": 2},
    "retention": {"budget": 5, "interval": 3},
}
# the check, its dtype, and how many spans its texts are long (None: as long as in the matrix)
CHECKS = {
    f"{name}-{short}": (check, dtype, spans)
    for short, dtype in (("float64", torch.float64), ("float32", torch.float32))
    for name, check, spans in (
        ("streaming", partial(check_streaming, splits=4), None),
        ("padding", check_padding, 2),
        ("packing", check_packing, 2),
    )
}
CHECKS |= {
    "bites": (check_bites, torch.float64, None),
    "causality": (check_causality, torch.float32, None),
    "rows": (check_rows, torch.float64, None),
    "restart": (check_restart, torch.float64, None),
    "value": (check_value, torch.float32, None),
    "size": (partial(check_size, lengths=(16, 130)), torch.float32, None),
    "flops": (partial(check_flops, lengths=(16, 67)), torch.float32, None),
    "gradients": (check_gradients, torch.float64, None),
}


def policy(name):
    return {"type": name.partition(",")[0], **POLICIES[name]}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", POLICIES)
def test_contract(name, check):
    torch.manual_seed(0)
    mixer = build_mixer({**HEADS, "policy": policy(name)})
    run, dtype, spans = CHECKS[check]
    run(Subject(mixer, dtype=dtype, num_tokens=None if spans is None else spans * mixer.span + 3))


def test_every_policy_is_here_or_refused():
    needed = {"compresskv": {"heads": [[0]]}, "sentencekv": {"boundary_ids": [3], "budget": 80}}
    for name in PRESETS:
        if name not in POLICIES:
            sizes = {} if name in ("mikv", "think") else {"cache_size" if name == "arkv" else "budget": 64}
            given = {"type": name, **sizes, **needed.get(name, {})}
            assert not make_policy(given).is_exact
            with pytest.raises(ValueError, match="prompt has been read whole"):
                build_mixer({**HEADS, "policy": given})
