"""Gemma 3n, as transformers' modeling_gemma3n.py and configuration_gemma3n.py have it.

Its layers have several streams, of which they compute one (AltUp), a second residual of low rank (LAuReL), inputs of
their own as Gemma 4's, and MLPs of which, in the first ten, only the outputs far above the mean count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from gemexport.formats.gemma.architecture import Architecture, Layer, PerLayerEmbeddings, Rope, Streams
from gemexport.formats.gemma.facts import COMMON, CONFIG, SLIDING_THETA, Fact, Flat, Form, spelt
from gemexport.formats.gemma.families.family import Family, Wording, rope
from gemexport.formats.gemma.fields import FULL, SLIDING, Least, Positive, Size, TextFields
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role

THETAS = {SLIDING: 10_000.0, FULL: 1_000_000.0}
PERIOD = 5  # every fifth layer sees everything
SPARSE, SPARSITY = 10, 0.95  # so many layers, and how sparse, of a config that does not say it
SOFTCAP = 30.0
MOST = 4  # streams
OWNERS, RANK, TOLD = 20, 64, 256  # layers with keys, rank of the residual, width of per-layer inputs in llama.cpp
UNCLIPPED = 1e30  # transformers clips coefficients when it trains alone, and mlx-lm always

Share = Annotated[float, Field(strict=True, ge=0, lt=1)]


def _usual(flat: Mapping[str, Any]) -> list[bool]:
    """Which layers slide where a file does not say it."""
    return [bool((index + 1) % PERIOD) for index in range(flat["layers"])]


def _shared(flat: Mapping[str, Any]) -> int:
    """How many layers read the keys of others: all after the twentieth."""
    return max(0, int(flat["layers"]) - OWNERS)


# src/models/gemma3n.cpp, which has the rest built in: see `Gemma3n.built_in`.
FACTS = (
    *COMMON,
    Fact("full.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base", SLIDING_THETA),
    Fact("sliding.rope.theta", Form.POSITIVE, "{arch}.rope.freq_base_swa", SLIDING_THETA),
    Fact("sliding_window", Form.COUNT, "{arch}.attention.sliding_window"),
    Fact("sliding", Form.PERIOD, "{arch}.attention.sliding_window_pattern", _usual, always=False),
    Fact(
        "shared", Form.COUNT_OR_NONE, "{arch}.attention.shared_kv_layers", lambda flat: max(0, flat["layers"] - OWNERS)
    ),
    Fact("per_layer.dim", Form.COUNT, "{arch}.embedding_length_per_layer_input", TOLD),
    Fact("streams.active", Form.COUNT_OR_NONE, "{arch}.altup.active_idx", 0),
    Fact("streams.count", Form.COUNT, "{arch}.altup.num_inputs", MOST),
)


class Fields(TextFields):
    """Gemma 3n's own fields, in the spelling of its release and in that of transformers 5."""

    intermediate_size: Size | list[Size] = 16_384  # type: ignore[assignment]
    num_key_value_heads: Size = 2
    max_position_embeddings: Size = 32_768
    sliding_window_pattern: Size | None = PERIOD
    final_logit_softcapping: Positive | None = SOFTCAP
    rope_theta: Positive | None = None
    rope_local_base_freq: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    hidden_size_per_layer_input: Size = 256
    vocab_size_per_layer_input: Size = 262_144
    num_kv_shared_layers: Least = 15
    altup_num_inputs: Annotated[Size, Field(ge=2, le=MOST)] = 4
    altup_active_idx: Least = 0
    altup_correct_scale: Literal[True] = True
    laurel_rank: Size = 64
    activation_sparsity_pattern: Share | list[Share] | None = None

    def widths(self) -> list[int]:
        """The width of each layer's MLP."""
        given = self.intermediate_size
        return given if isinstance(given, list) else [given] * self.num_hidden_layers

    def sparsities(self) -> list[float]:
        """How sparse each layer's MLP is."""
        given, count = self.activation_sparsity_pattern, self.num_hidden_layers
        if given is None:
            sparse = SPARSE if count > SPARSE else 0
            return [SPARSITY] * sparse + [0.0] * (count - sparse)
        return given if isinstance(given, list) else [given] * count


class Gemma3n(Family[Fields]):
    """Keys and values are shared as Gemma 4's are; heads have one size."""

    name = whole_type = "gemma3n"
    text_type = reference_type = "gemma3n_text"
    gguf = "gemma3n"
    gguf_pads_tables = True
    gguf_reads_keys = OWNERS
    gguf_owners = 2  # its shared layers read the last two before them
    mlx_type = "gemma3n"
    mlx_module = "model.language_model"
    mlx_shares_by_cache = True
    whole_class = "Gemma3nForConditionalGeneration"
    reference_class = "Gemma3nForCausalLM"
    wording = Wording(("<start_of_turn>", "<end_of_turn>"), eos="<end_of_turn>", adds_runs=True)
    facts = FACTS
    fields = Fields
    default_vocabulary = 262_400
    default_window = 512
    norm_offset = 0.0
    value_norm = True
    partial_rope = False
    sentencepiece = True
    layer_scalar = False

    def refused(self, fields: Fields) -> dict[str, bool]:
        layers = fields.num_hidden_layers
        return {
            **fields.refused(),
            "every layer would share keys and values": fields.num_kv_shared_layers >= layers,
            "the stream that is computed is none of those that there are": fields.altup_active_idx
            >= fields.altup_num_inputs,
            "intermediate_size is not of as many layers as there are": len(fields.widths()) != layers,
            "activation_sparsity_pattern is not of as many layers as there are": len(fields.sparsities()) != layers,
        }

    def layers(self, fields: Fields) -> tuple[Layer, ...]:
        types, widths, sparsities = fields.types(), fields.widths(), fields.sparsities()
        first_shared = fields.num_hidden_layers - fields.num_kv_shared_layers
        layers = []
        for index, kind in enumerate(types):
            # A shared layer reads the last layer of its own attention type that computes keys and values.
            donors = [i for i in range(first_shared) if types[i] == kind]
            if not donors:
                raise ValueError(f"layer {index} shares the keys of a {kind} layer, and there is none")
            layers.append(
                Layer(
                    index=index,
                    sliding=kind == SLIDING,
                    head_dim=fields.head_dim,
                    kv_heads=fields.num_key_value_heads,
                    intermediate_size=widths[index],
                    rope=self._rope(fields, kind),
                    kv_source=index if index < first_shared else donors[-1],
                    sparsity=sparsities[index],
                )
            )
        return tuple(layers)

    def _rope(self, fields: Fields, kind: str) -> Rope:
        given = dict((fields.rope_parameters or {}).get(kind) or {})
        if kind == FULL and fields.rope_scaling:
            given |= fields.rope_scaling
        flat = fields.rope_theta if kind == FULL else fields.rope_local_base_freq
        given.setdefault("rope_theta", flat or THETAS[kind])
        return rope(given, fields.head_dim)

    def own_config(self, flat: Flat) -> dict[str, Any]:
        own = ("shared", "final_softcap", "per_layer.dim", "per_layer.vocab_size", "sparsity")
        factor = flat["full.rope.factor"]
        thetas = {"rope_local_base_freq": flat["sliding.rope.theta"], "rope_theta": flat["full.rope.theta"]}
        return {
            **spelt(flat, *own, "streams.count", "streams.active", "streams.rank"),
            "altup_correct_scale": True,
            "intermediate_size": flat["intermediate_size"],
            "head_dim": flat["full.head_dim"],
            "num_key_value_heads": flat["kv_heads"][0],
            "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
            **{key: theta for key, theta in thetas.items() if theta is not None},
        }

    def unread(self, decoder: Architecture) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in decoder.layers:
            if not layer.owns_cache:
                matrix = (layer.kv_heads * layer.head_dim, decoder.hidden_size)
                of_layer = {Role.K: matrix, Role.V: matrix, Role.K_NORM: (layer.head_dim,)}
                shapes |= {CANONICAL.name(role, layer.index): shape for role, shape in of_layer.items()}
        return shapes

    def mlx_config(self, flat: Flat, source: dict[str, Any]) -> dict[str, Any]:
        return {"altup_coef_clip": UNCLIPPED}

    def mlx_whole(self, config: dict[str, Any]) -> dict[str, Any]:
        outside = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        return {
            "architectures": [self.whole_class],
            "model_type": self.mlx_type,
            "text_config": config,
            **{key: config[key] for key in outside if key in config},
        }

    def mlx_problem(self, flat: Flat) -> str | None:
        if flat["full.rope.factor"] != 1.0 or flat["sliding.rope.factor"] != 1.0:
            return "scales positions"
        if len(set(flat["sliding"])) == 1:
            return "has one type of attention alone"
        return None if flat["tied"] else "has a head of its own"

    def built_in(self, layers: int) -> Flat:
        sparse = min(SPARSE, layers)
        return {
            "final_softcap": SOFTCAP,
            "full.rope.factor": 1.0,
            "full.rope.scaling": None,
            "sparsity": [SPARSITY] * sparse + [0.0] * (layers - sparse),
            "streams.rank": RANK,
        }

    def gguf_problem(self, flat: Flat) -> str | None:
        layers = flat["layers"]
        expected = {
            **self.built_in(layers),
            "sliding.rope.factor": 1.0,
            "shared": _shared(flat),
            "sliding": _usual(flat),
            "streams.count": MOST,
            "streams.active": 0,
            "per_layer.dim": TOLD,
            "intermediate_size": flat["intermediate_size"][:1] * layers,
        }
        wrong = next((name for name, value in expected.items() if flat[name] != value), None)
        return None if wrong is None else f"its {CONFIG.get(wrong, wrong)} is another than is built in"

    def attention_scale(self, fields: Fields) -> float:
        return 1.0

    def gguf_attention_scale(self, layers: int, head_dim: int, hidden: int, heads: int) -> float:
        return 1.0

    def per_layer(self, fields: Fields) -> PerLayerEmbeddings | None:
        dim = fields.hidden_size_per_layer_input
        return PerLayerEmbeddings(
            dim=dim,
            vocab_size=fields.vocab_size_per_layer_input,
            embed_scale=dim**0.5,
            projection_scale=fields.hidden_size**-0.5,
        )

    def streams(self, fields: Fields) -> Streams | None:
        return Streams(count=fields.altup_num_inputs, active=fields.altup_active_idx, rank=fields.laurel_rank)
