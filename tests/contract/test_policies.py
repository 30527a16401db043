"""The contract for every policy that compresses on the token grid, beside the two in the matrix.

Left out are the checks that say the same for every policy (reordered rows, compilation) and those that ask
for equal choices from rounded scores (bfloat16, autocast).
"""

import pytest
import torch

from memzoo.layers import build_mixer
from memzoo.layers.policies import PRESETS, make_policy
from memzoo.testing import Subject, check_size, contract_checks

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
CHECKS = (
    "streaming-float64",
    "causality",
    "flops",
    "gradients",
)


def policy(name):
    return {"type": name.partition(",")[0], **POLICIES[name]}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", POLICIES)
def test_contract(name, check):
    torch.manual_seed(0)
    contract_checks(build_mixer({**HEADS, "policy": policy(name)}), splits=4)[check]()


@pytest.mark.parametrize("name", ["kvmerger", "snapkv, adaptive"])
def test_rows_of_unequal_lengths(name):
    torch.manual_seed(0)
    checks = contract_checks(build_mixer({**HEADS, "policy": policy(name)}))
    checks["padding-float64"]()
    checks["packing-float64"]()


@pytest.mark.parametrize("name", POLICIES)
def test_declared_bytes(name):
    torch.manual_seed(0)
    mixer = build_mixer({**HEADS, "policy": policy(name)})
    check_size(Subject(mixer, dtype=torch.float32), lengths=(16, 130))


def test_every_policy_is_here_or_refused():
    needed = {"compresskv": {"heads": [[0]]}}
    for name in PRESETS:
        if name not in POLICIES:
            sizes = {} if name in ("mikv", "think") else {"cache_size" if name == "arkv" else "budget": 64}
            given = {"type": name, **sizes, **needed.get(name, {})}
            assert not make_policy(given).is_exact
            with pytest.raises(ValueError, match="prompt has been read whole"):
                build_mixer({**HEADS, "policy": given})
