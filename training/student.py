"""The model that is trained, with what reads and writes it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalm_rag.model.pooling import mean_groups
from kalm_rag.model.prompts import PASSAGE_PREFIX, Prompts
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.settings import Settings
from training import start
from training.objective import Heads
from training.recipe import Recipe


class Student:
    """The model, and linear readings of it.

    Args:
        model: a `T5Gemma2ForConditionalGeneration` with the weights training starts from.
        fast: the tokenizer of transformers.
        recipe: for the report.
        out: where the checkpoint goes.
        device: where it runs.
        dtype: what products are computed in; the weights are float32.
    """

    # The vision tower is never used; the output matrix and the decoder's embeddings are the encoder's embeddings.
    NOT_STORED = ("vision_tower", "multi_modal", "lm_head", "decoder.embed_tokens.weight")

    def __init__(
        self, model: Any, fast: Any, recipe: Recipe, out: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.recipe, self.out, self.device, self.dtype = model.to(device), recipe, out, device, dtype
        self.tokenizer = Tokenizer(fast)
        self.prompts = Prompts(self.tokenizer, Settings(), start.POSITIONS)
        self.prefix = self.tokenizer.encode([PASSAGE_PREFIX])[0]
        self.heads = Heads().to(device)

    def compile(self) -> None:
        """Compile the layers: 1.4 times as fast on a CPU, and needs a C++ compiler."""
        torch._dynamo.config.recompile_limit = 64  # one code object serves every layer
        # Two lengths that happen to be equal need not stay so.
        torch.fx.experimental._config.use_duck_shape = False
        for layer in [*self.model.get_encoder().text_model.layers, *self.model.get_decoder().layers]:
            layer.compile(dynamic=True)

    def load(self, folder: Path) -> None:
        """Take the weights of a checkpoint folder.

        Raises:
            ValueError: it has others than the model.
        """
        import safetensors.torch

        state = safetensors.torch.load_file(folder / "model.safetensors")
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        wrong = [name for name in missing if not any(part in name for part in self.NOT_STORED)]
        if wrong or unexpected:
            msg = f"{folder} does not fit the recipe: missing {wrong[:3]}, unexpected {list(unexpected)[:3]}"
            raise ValueError(msg)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the encoder's states of token ids, both of shape `(batch, tokens)`."""
        with self.autocast():
            states: Tensor = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    def decode(
        self, states: Tensor, mask: Tensor, prompts: Tensor, prompts_mask: Tensor, passage: Tensor, ratio: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Margins, states before the last layer, and final states at the last position, all float32."""
        pooled = mean_groups(states, mask.float(), ratio)
        lengths = -(-mask.sum(1) // ratio)
        pooled_mask = (torch.arange(pooled.shape[1], device=self.device) < lengths[:, None]).long()
        with self.autocast():
            made = self.model.get_decoder()(
                input_ids=prompts,
                attention_mask=prompts_mask,
                encoder_hidden_states=pooled[passage],
                encoder_attention_mask=pooled_mask[passage],
                use_cache=False,
                output_hidden_states=True,
            )
        rows = torch.arange(len(prompts), device=self.device)
        last = made.last_hidden_state[rows, prompts_mask.sum(1) - 1].float()
        table = self.model.get_output_embeddings().weight
        direction = table[self.tokenizer.yes_id] - table[self.tokenizer.no_id]
        return last @ direction.float(), made.hidden_states[-2].float(), last

    def padded(self, rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and mask of shape `(rows, width)` on the device, by default the next multiple of 16 tokens.

        Few different shapes matter: the CPU library prepares its kernels once per shape.
        """
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), width or -(-int(lengths.max()) // 16) * 16, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids.to(self.device), mask.to(self.device)

    def autocast(self) -> torch.autocast:
        """Products in bfloat16 where the machine is fast at it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def save(self, scores: dict[str, float]) -> None:
        """Write the weights in bfloat16, without the vision tower, and what they were trained with."""
        import safetensors.torch

        state = {
            name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for name, tensor in self.model.state_dict().items()
            if not any(part in name for part in self.NOT_STORED)
        }
        safetensors.torch.save_file(state, self.out / "model.safetensors", metadata={"format": "pt"})
        self.model.config.save_pretrained(self.out)
        report = {"development": scores, "recipe": asdict(self.recipe)}
        (self.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
