"""Rows of facts are used both ways, and their keys are gguf's."""

from __future__ import annotations

import re
from typing import Any

import pytest
from gguf.constants import Keys

from gemexport.demo import SIZES, config_json
from gemexport.formats.gemma.facts import CONFIG, FULL, SLIDING, flat_facts, gguf_label
from gemexport.formats.gemma.families import FAMILIES
from gemexport.formats.gemma.model import describe

NUMBERED = re.compile(r"dense_\d_feat")
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.75}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
EVEN = [FULL if index % 2 else SLIDING for index in range(8)]
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {}),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_key_value_heads": 2}),
    ("gemma4", {}),
    ("gemma4", {"num_kv_shared_layers": 0, "use_double_wide_mlp": False, "final_logit_softcapping": None}),
    ("gemma4", {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0}),
    ("gemma4", {"rope_parameters": {FULL: PROPORTIONAL, SLIDING: LINEAR}, "tie_word_embeddings": False}),
    ("gemma4", {"layer_types": EVEN, "per_layer_config": {"1": {"head_dim": 64, "num_key_value_heads": 2}}}),
    ("gemma4", {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 48}),
    ("gemma4_unified", {}),
    ("gemma2", {}),
    ("gemma2", {"layer_types": [FULL, FULL, SLIDING, FULL], "attn_logit_softcapping": None}),
    ("gemma", {"rope_theta": 20000.0, "head_dim": 48}),
    ("vaultgemma", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("family", "changes"), CONFIGS)
def test_a_config_made_of_facts_says_the_same_decoder(family: Any, changes: dict[str, Any]) -> None:
    config = {**config_json(family, SIZES["tiny"]), **changes}
    if "per_layer_config" in changes:
        config["per_layer_config"] = {str(i): changes["per_layer_config"]["1"] for i, k in enumerate(EVEN) if k == FULL}
    model = describe(config, "config.json")
    own = {key: config[key] for key in ("model_type", "sliding_window", "eos_token_id", "query_pre_attn_scalar")
           if key in config}  # fmt: skip
    again = {**own, **model.family.config(flat_facts(model.decoder))}
    assert again.keys() >= {CONFIG[name] for name in ("hidden_size", "heads", "layers", "tied")}
    assert describe(again, "config.json").decoder == model.decoder


def test_the_keys_of_rows_are_those_of_gguf() -> None:
    known = {value for part in vars(Keys).values() if isinstance(part, type) for value in vars(part).values()}
    for family in FAMILIES:
        assert {NUMBERED.sub("{dense}_feat", fact.gguf) for fact in family.facts} <= known
        names = set(flat_facts(describe(config_json(family.name, SIZES["tiny"]), "config.json").decoder))
        assert {fact.name for fact in family.facts} <= names
        assert {fact.needs for fact in family.facts} <= names | {""}


def test_a_verdict_calls_a_fact_as_the_file_does() -> None:
    new = FAMILIES[1].facts
    assert gguf_label(new, "rope.theta", sliding=True) == "{arch}.rope.freq_base_swa"
    assert gguf_label(new, "head_dim", sliding=False) == "{arch}.attention.key_length"
    assert gguf_label(new, "kv_source", sliding=False).startswith("{arch}.attention.shared_kv_layers: ")
    assert gguf_label(new, "rope.factor", sliding=False).startswith("rope_freqs.weight: ")
    assert gguf_label(FAMILIES[0].facts, "rope.factor", sliding=False) == "{arch}.rope.scaling.factor"
