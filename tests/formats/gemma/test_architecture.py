"""Configs in every spelling become the same decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gemexport.demo import SIZES, config_json
from gemexport.formats.gemma.model import architecture, describe
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Kind, Role
from gemexport.formats.storage.errors import InputError


def gemma4(**changes: Any) -> dict[str, Any]:
    return {**config_json("gemma4", SIZES["tiny"]), **changes}


def test_old_and_new_spelling_are_the_same_decoder() -> None:
    old = config_json("gemma4", SIZES["tiny"])
    new = AutoConfig.for_model(**old).to_dict()
    assert "per_layer_config" in new
    assert "global_head_dim" in old
    assert architecture(new, "config.json") == architecture(old, "config.json")


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_tensors_are_those_of_transformers(family: Any) -> None:
    config = config_json(family, SIZES["tiny"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert architecture(config, "config.json").tensor_shapes() == theirs


def test_experts_are_those_of_transformers() -> None:
    config = gemma4(enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=48)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    found = describe(config, "config.json")
    assert {name: spec.shape for name, spec in found.specs.items()} == theirs
    kinds = {spec.role.kind for spec in found.specs.values()}
    assert kinds == set(Kind) - {Kind.HEAD, Kind.MIXER}
    for spec in found.specs.values():
        assert spec.role.has_rows == (len(spec.shape) > 1)
        assert CANONICAL.find(spec.name) == (spec.role, spec.layer)


def test_every_role_has_one_name_and_every_name_one_role() -> None:
    for role in Role:
        layer = 12 if role.in_layer else None
        assert CANONICAL.find(CANONICAL.name(role, layer)) == (role, layer)
    for wrong in (
        "model.layers.07.layer_scalar",
        "model.layers.1.layer_scalar.weight",
        "model.layers.layer_scalar",
        "",
    ):
        assert CANONICAL.find(wrong) is None


def test_rope_frequencies_are_those_of_transformers() -> None:
    config = AutoConfig.for_model(**gemma4())
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config)
    ours = architecture(gemma4(), "config.json")
    for layer in ours.layers:
        kind = "sliding_attention" if layer.sliding else "full_attention"
        theirs = getattr(model.model.rotary_emb, f"{kind}_inv_freq").double().numpy()
        # transformers computes in float32: two roundings of a power
        np.testing.assert_allclose(layer.rope.inv_freq(layer.head_dim), theirs, rtol=1e-6)


def test_gemma3_with_the_spelling_of_its_release() -> None:
    config = {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    decoder = architecture(config, "config.json")
    assert [layer.index for layer in decoder.layers if not layer.sliding] == [5, 11, 17, 23]
    assert decoder.layers[5].rope.factor == 8.0
    assert decoder.layers[0].rope.factor == 1.0
    assert decoder.layers[0].rope.theta == 1e4
    assert decoder.parameters() == 999_885_952


def test_what_the_whole_model_says_of_head_and_stops_decides() -> None:
    inner = gemma4(eos_token_id=1, tie_word_embeddings=True)
    whole = {"model_type": "gemma4", "text_config": inner, "eos_token_id": [1, 106], "tie_word_embeddings": False}
    decoder = architecture(whole, "config.json")
    assert decoder.eos_token_ids == (1, 106)
    assert not decoder.tied
    silent = architecture({**whole, "eos_token_id": None, "tie_word_embeddings": None}, "config.json")
    assert silent.eos_token_ids == (1,)
    assert silent.tied


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "llama"}, "the architecture 'llama' is not known"),
        ({"enable_moe_block": True}, "it has experts, and does not say how many"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": -5}, "hidden_size"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"hidden_activation": "silu"}, "the activation is silu"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        architecture(gemma4(**changes), "model/config.json")
    assert str(caught.value).startswith("model/config.json: ")
    assert "\n" not in str(caught.value)


def test_streams_are_those_of_transformers() -> None:
    config = config_json("gemma3n", SIZES["tiny"]) | {"altup_num_inputs": 3}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    found = describe(config, "config.json")
    assert {name: spec.shape for name, spec in found.specs.items()} == theirs
    assert {spec.role for spec in found.specs.values() if spec.role.kind is Kind.MIXER} == {
        Role.STREAMS_ROUTER,
        Role.STREAMS_PREDICTION,
        Role.STREAMS_CORRECTION,
    }
    sparse = [layer.deviations for layer in found.decoder.layers]
    assert sparse == [pytest.approx(1.6448536)] * 10 + [None] * (len(sparse) - 10)
    assert [layer.kv_source for layer in found.decoder.layers[19:]] == [19, *[18] * 4, 19]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"altup_num_inputs": 5}, "altup_num_inputs: .*4, not 5"),
        ({"altup_active_idx": 4}, "the stream that is computed is none of those that there are"),
        ({"altup_correct_scale": False}, "altup_correct_scale: "),
        ({"intermediate_size": [64]}, "intermediate_size is not of as many layers as there are"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern is not of as many layers"),
        ({"activation_sparsity_pattern": 1.0}, "activation_sparsity_pattern"),
        ({"num_kv_shared_layers": 25}, "every layer would share keys and values"),
        ({"num_kv_shared_layers": 22}, "shares the keys of a full_attention layer, and there is none"),
    ],
)
def test_what_a_gemma_3n_cannot_say_is_refused(said: dict[str, Any], words: str) -> None:
    config = config_json("gemma3n", SIZES["tiny"]) | said
    with pytest.raises(InputError, match=words):
        describe(config, "config.json")
