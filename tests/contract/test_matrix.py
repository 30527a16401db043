"""The contract matrix: every registered mixer and every probe, two small configs each, against every check.

A mixer enters by being registered. MEMZOO_SPLITS sets the number of random splits (default 25, `make
contract` 200).
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from memzoo.layers import TokenMixer, build_mixer, list_mixers
from memzoo.testing import contract_checks, small_configs

from .probes.documents import Documents, DocumentsConfig
from .probes.eidetic import Eidetic, EideticConfig
from .probes.eviction import RetentionAttention, RetentionCache, RetentionCacheConfig, RetentionConfig
from .probes.fast_weights import FastWeights, FastWeightsConfig
from .probes.segment_mean import SegmentMean, SegmentMeanConfig

PROBES = {
    "documents": (Documents, DocumentsConfig),
    "eidetic": (Eidetic, EideticConfig),
    "fast_weights": (FastWeights, FastWeightsConfig),
    "retention_attention": (RetentionAttention, RetentionConfig),
    "retention_cache": (RetentionCache, RetentionCacheConfig),
    "segment_mean": (SegmentMean, SegmentMeanConfig),
}
CHECKS = list(contract_checks(SegmentMean(SegmentMeanConfig(**SegmentMean.small_configs()[0]))))


def _build_probe(name: str, index: int) -> TokenMixer:
    mixer, config = PROBES[name]
    return mixer(config(**mixer.small_configs()[index]))


def _build_registered(name: str, index: int) -> TokenMixer:
    return build_mixer(small_configs(name)[index])


def _subjects() -> Iterator[pytest.param]:
    for names, build, prefix in ((list_mixers(), _build_registered, ""), (PROBES, _build_probe, "probe_")):
        for name in names:
            for index in range(2):
                yield pytest.param(partial(build, name, index), id=f"{prefix}{name}-{index}")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("build", list(_subjects()))
def test_contract(build, check, record_property, request):
    torch.manual_seed(0)
    error = contract_checks(build())[check]()
    # conftest.py gathers these into the record of `make contract`
    subject = request.node.callspec.id.removesuffix(f"-{check}")
    record_property("contract", [subject, check, error])


def test_every_mixer_has_two_unequal_small_configs():
    for name in list_mixers():
        first, second = small_configs(name)
        assert first["type"] == second["type"] == name
        assert first != second
