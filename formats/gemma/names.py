"""Names of tensors: a table of roles for each kind of files, used both ways.

The canonical names are those of transformers' text models (modeling_gemma3.py, modeling_gemma4.py), and of the modules
of sentence-transformers, by their folders. The names of other
formats are tables of the same kind beside what reads these formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gemexport.formats.gemma.roles import Role

Place = tuple[Role, int | None]  # a role, and the layer's number for what every layer has

_NUMBER = re.compile(r"(?<=[._/])\d+(?=[._/])")
WEIGHT = ".weight"
# The same decoder under the names of transformers' classes: alone, inside a multimodal model of today and of before,
# and either without a head (AutoModel).
_SPELLINGS = (
    (re.compile(r"^model\.language_model\.(.+)$"), r"model.\1"),
    (re.compile(r"^language_model\.model\.(.+)$"), r"model.\1"),
    (re.compile(r"^language_model\.(lm_head\..+)$"), r"\1"),
    (
        re.compile(
            r"^(?:language_model\.)?((?:layers|embed_tokens|embed_tokens_per_layer|norm|(?:per_layer|altup)_\w+)\..+)$"
        ),
        r"model.\1",
    ),
)


class Dialect:
    """What tensors are called somewhere: by role a name, with `{}` for the layer's number."""

    def __init__(self, names: Mapping[Role, str]) -> None:
        self._names = dict(names)
        self._roles = {name: role for role, name in names.items()}

    def __contains__(self, role: Role) -> bool:
        return role in self._names

    def name(self, role: Role, layer: int | None = None) -> str:
        """The name of a tensor; KeyError for a role that has none here."""
        if role.in_layer != (layer is not None):
            raise ValueError(f"{role} of layer {layer}")
        name = self._names[role]
        return name if layer is None else name.replace("{}", str(layer), 1)

    def find(self, name: str) -> Place | None:
        """The role, and the layer, of the tensor called so; None for a name that is in no row."""
        if (role := self._roles.get(name)) is not None:
            return role, None
        number = _NUMBER.search(name)
        if number is None or str(int(number[0])) != number[0]:
            return None
        role = self._roles.get(f"{name[: number.start()]}{{}}{name[number.end() :]}")
        return None if role is None else (role, int(number[0]))

    def template(self, role: Role) -> str:
        """The name of a role, with `{}` for the layer's number."""
        return self._names[role]

    def stem(self, role: Role) -> str:
        """What a tensor is called within its layer, or at the top: `self_attn.q_proj`."""
        return self._names[role].rpartition("{}")[2].removeprefix(".").removesuffix(WEIGHT)


LAYERS = "model.layers"  # the module that holds all layers
_LAYER = f"{LAYERS}.{{}}."
CANONICAL = Dialect(
    {
        Role.EMBEDDING: "model.embed_tokens.weight",
        Role.PER_LAYER_EMBEDDING: "model.embed_tokens_per_layer.weight",
        Role.PER_LAYER_MODEL_PROJECTION: "model.per_layer_model_projection.weight",
        Role.PER_LAYER_MODEL_NORM: "model.per_layer_projection_norm.weight",
        Role.FIRST_SPREAD: "model.altup_projections.0.weight",
        Role.SECOND_SPREAD: "model.altup_projections.1.weight",
        Role.THIRD_SPREAD: "model.altup_projections.2.weight",
        Role.STREAMS_NORM: f"{_LAYER}altup.router_norm.weight",
        Role.STREAMS_ROUTER: f"{_LAYER}altup.modality_router.weight",
        Role.STREAMS_PREDICTION: f"{_LAYER}altup.prediction_coefs.weight",
        Role.STREAMS_CORRECTION: f"{_LAYER}altup.correction_coefs.weight",
        Role.STREAM_SCALE: f"{_LAYER}altup.correct_output_scale",
        Role.RESIDUAL_LEFT: f"{_LAYER}laurel.linear_left.weight",
        Role.RESIDUAL_RIGHT: f"{_LAYER}laurel.linear_right.weight",
        Role.RESIDUAL_NORM: f"{_LAYER}laurel.post_laurel_norm.weight",
        Role.INPUT_NORM: f"{_LAYER}input_layernorm.weight",
        Role.Q: f"{_LAYER}self_attn.q_proj.weight",
        Role.Q_NORM: f"{_LAYER}self_attn.q_norm.weight",
        Role.K: f"{_LAYER}self_attn.k_proj.weight",
        Role.K_NORM: f"{_LAYER}self_attn.k_norm.weight",
        Role.V: f"{_LAYER}self_attn.v_proj.weight",
        Role.O: f"{_LAYER}self_attn.o_proj.weight",
        Role.POST_ATTENTION_NORM: f"{_LAYER}post_attention_layernorm.weight",
        Role.PRE_MLP_NORM: f"{_LAYER}pre_feedforward_layernorm.weight",
        Role.GATE: f"{_LAYER}mlp.gate_proj.weight",
        Role.UP: f"{_LAYER}mlp.up_proj.weight",
        Role.DOWN: f"{_LAYER}mlp.down_proj.weight",
        Role.POST_DENSE_NORM: f"{_LAYER}post_feedforward_layernorm_1.weight",
        Role.ROUTER_SCALE: f"{_LAYER}router.scale",
        Role.ROUTER: f"{_LAYER}router.proj.weight",
        Role.EXPERT_SCALE: f"{_LAYER}router.per_expert_scale",
        Role.PRE_EXPERTS_NORM: f"{_LAYER}pre_feedforward_layernorm_2.weight",
        Role.EXPERT_GATE_UP: f"{_LAYER}experts.gate_up_proj",
        Role.EXPERT_DOWN: f"{_LAYER}experts.down_proj",
        Role.POST_EXPERTS_NORM: f"{_LAYER}post_feedforward_layernorm_2.weight",
        Role.POST_MLP_NORM: f"{_LAYER}post_feedforward_layernorm.weight",
        Role.PER_LAYER_GATE: f"{_LAYER}per_layer_input_gate.weight",
        Role.PER_LAYER_PROJECTION: f"{_LAYER}per_layer_projection.weight",
        Role.POST_PER_LAYER_NORM: f"{_LAYER}post_per_layer_input_norm.weight",
        Role.LAYER_SCALAR: f"{_LAYER}layer_scalar",
        Role.FIRST_GATHERING: "model.altup_unembed_projections.0.weight",
        Role.SECOND_GATHERING: "model.altup_unembed_projections.1.weight",
        Role.THIRD_GATHERING: "model.altup_unembed_projections.2.weight",
        Role.FINAL_NORM: "model.norm.weight",
        Role.HEAD: "lm_head.weight",
        Role.FIRST_DENSE: "2_Dense.linear.weight",
        Role.SECOND_DENSE: "3_Dense.linear.weight",
    }
)


def role_of(name: str) -> Role | None:
    """What the tensor of this canonical name is for; None for a name that no decoder has."""
    place = CANONICAL.find(name)
    return None if place is None else place[0]


def is_norm(name: str) -> bool:
    """Whether the tensor of this canonical name is what an RMSNorm multiplies by."""
    role = role_of(name)
    return role is not None and role.is_norm


def module_of(name: str) -> str:
    """The module that a tensor is the weight of."""
    return name.removesuffix(WEIGHT)


def layer_module(layer: int) -> str:
    """A layer's module, by its canonical name."""
    return _LAYER.format(layer).removesuffix(".")


def attention_module(layer: int) -> str:
    """The module of a layer's attention, which its caches go by too."""
    return CANONICAL.name(Role.Q, layer).removesuffix(f".{CANONICAL.stem(Role.Q).rpartition('.')[2]}{WEIGHT}")


def canonical_name(name: str) -> str:
    """The name that transformers' text model gives to a tensor of any of the classes that contain it."""
    for pattern, replacement in _SPELLINGS:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name


EMBEDDING, PER_LAYER_EMBEDDING = CANONICAL.name(Role.EMBEDDING), CANONICAL.name(Role.PER_LAYER_EMBEDDING)
EMBEDDINGS = (EMBEDDING, PER_LAYER_EMBEDDING)
HEAD = CANONICAL.name(Role.HEAD)
FINAL_NORM = CANONICAL.name(Role.FINAL_NORM)  # a tensor that no format quantizes: it has the model's own dtype
