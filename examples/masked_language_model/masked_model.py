"""A small masked language model of LLaDA's kind: a bidirectional transformer that fills in masks.

Names and nesting are LLaDA's (`model.transformer.blocks`, `q_proj`, `attn_out`, `ff_proj`, ...), so
that what is written for its blocks runs on these. Shapes: B sequences, N tokens, D channels, C
channels of a head, V token ids.
Source: LLaDA, arXiv 2502.09992; RoFormer, arXiv 2104.09864; grouped-query attention, 2305.13245.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from digit_tasks import EQUALS, MASK, NUM_DIGITS, PAD, PLUS, SUM, VOCABULARY
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).parent
ROTARY_BASE = 100.0  # positions go to 12, far below LLaDA's thousands

Rotary = tuple[Float[Tensor, "B 1 N C"], Float[Tensor, "B 1 N C"]]


@dataclass(frozen=True)
class Config:
    """Sizes of the model, and what the sampler must know of its tokens."""

    num_layers: int = 4
    width: int = 64
    num_heads: int = 4
    num_key_value_heads: int = 2
    mlp_width: int = 176
    vocab_size: int = len(VOCABULARY)
    mask_token_id: int = MASK
    pad_token_id: int = PAD
    max_sequence_length: int = 3 + 3 * NUM_DIGITS


@dataclass
class Output:
    """What a call returns."""

    logits: Float[Tensor, "B N V"]


class MaskedBlock(nn.Module):
    """Attention over all tokens, then a gated MLP, each on the normalised stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_width = config.width // config.num_heads
        key_width = self.head_width * config.num_key_value_heads
        self.attn_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, key_width, bias=False)
        self.v_proj = nn.Linear(config.width, key_width, bias=False)
        self.attn_out = nn.Linear(config.width, config.width, bias=False)
        self.ff_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.ff_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.ff_out = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "B N D"],
        attention_mask: Bool[Tensor, "B 1 1 N"] | None = None,
        position_embeddings: Rotary | None = None,
    ) -> Float[Tensor, "B N D"]:
        """The stream after this block.

        Args:
            hidden_states: the stream.
            attention_mask: true where a token may be looked at.
            position_embeddings: cosines and sines of the tokens' positions.
        """
        assert position_embeddings is not None
        x = self.attn_norm(hidden_states)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            rotated(q, position_embeddings),
            rotated(k, position_embeddings),
            v,
            attn_mask=attention_mask,
            enable_gqa=True,
        )
        hidden_states = hidden_states + self.attn_out(mixed.transpose(1, 2).flatten(2))
        x = self.ff_norm(hidden_states)
        mlp = self.ff_out(nn.functional.silu(self.ff_proj(x)) * self.up_proj(x))
        out: Tensor = hidden_states + mlp
        return out


class MaskedLanguageModel(nn.Module):
    """Logits of every token given all others; `model.transformer` holds it as in LLaDA.

    A token's position is its distance to the last sign that is no digit, so digit i of a prompt and
    of its response share position i; an embedding says in which of the three numbers it stands.

    Args:
        config: sizes.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.width),
            "segment": nn.Embedding(3, config.width),
            "blocks": nn.ModuleList(MaskedBlock(config) for _ in range(config.num_layers)),
            "ln_f": nn.RMSNorm(config.width, eps=1e-5),
            "ff_out": nn.Linear(config.width, config.vocab_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else 0.5)
        for block in parts["blocks"]:
            for layer in (block.q_proj, block.k_proj, block.v_proj, block.ff_proj, block.up_proj):
                nn.init.xavier_uniform_(layer.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of token ids."""
        found: nn.Embedding = self.model["transformer"]["wte"]
        return found

    def forward(
        self,
        input_ids: Int[Tensor, "B N"],
        attention_mask: Int[Tensor, "B N"] | None = None,
    ) -> Output:
        """Logits of all tokens.

        Args:
            input_ids: prompts, padded on the left, and responses.
            attention_mask: 0 at padding.
        """
        parts = self.model["transformer"]
        position, segment = layout(input_ids)
        rotary = self.rotary(position)
        seen = None if attention_mask is None else attention_mask.bool()[:, None, None]
        x = parts["wte"](input_ids) + parts["segment"](segment)
        for block in parts["blocks"]:
            x = block(x, attention_mask=seen, position_embeddings=rotary)
        return Output(parts["ff_out"](parts["ln_f"](x)))

    def rotary(self, position: Int[Tensor, "B N"]) -> Rotary:
        """Cosines and sines of the angles of every position."""
        width = self.config.width // self.config.num_heads
        steps = torch.arange(0, width, 2, device=position.device) / width
        angles = position[:, None, :, None] * ROTARY_BASE**-steps
        angles = torch.cat([angles, angles], -1)
        dtype = self.get_input_embeddings().weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Float[Tensor, "B heads n C"], rotary: Rotary) -> Float[Tensor, "B heads n C"]:
    """Queries or keys turned by their positions' angles."""
    first, second = x.chunk(2, -1)
    return x * rotary[0] + torch.cat([-second, first], -1) * rotary[1]


def layout(input_ids: Int[Tensor, "B N"]) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Position within its number, and the number: 0 and 1 in the prompt, 2 the response."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    sign = (input_ids >= SUM) & (input_ids < PAD)
    position = index - torch.where(sign, index, 0).cummax(1).values
    second = (input_ids == PLUS).cumsum(1).clamp(max=1)
    response = (input_ids == EQUALS).cumsum(1).clamp(max=1)
    return position, torch.where(response > 0, 2, second)


def load_model(folder: Path = HERE / "shipped") -> MaskedLanguageModel:
    """The shipped model, in float32.

    Args:
        folder: holds `config.json` and `model.safetensors`.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = MaskedLanguageModel(Config(**config))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval()


def config_text(config: Config) -> str:
    """The content of `config.json`."""
    return json.dumps(asdict(config), indent=2) + "\n"
