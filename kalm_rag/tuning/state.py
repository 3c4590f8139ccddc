"""What a training run needs to go on after it was killed, in one safetensors file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kalm_rag.tuning.adapter import replace_file

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FILE = "resume.safetensors"


@dataclass(slots=True)
class Progressed:
    """How far a run is.

    Attributes:
        owner: digest of the model, the data and the recipe that the run belongs to.
        step: steps done.
        best_step: step with the lowest validation loss; 0 is the model as it was.
        best_loss: that loss.
        waited: measurements of the validation loss since then.
        losses: `(step, training loss)`.
        validation: `(step, validation loss)`.
        seconds: spent training.
        ended: why training ended; empty while it goes on.
    """

    owner: str
    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    waited: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    ended: str = ""


def write_state(folder: Path, progressed: Progressed, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Keep a run's state; a fault is a line in the log, and training continues without.

    Returns:
        Whether it was written.
    """
    import safetensors.torch

    content = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"state": json.dumps(asdict(progressed))},
    )
    try:
        replace_file(folder / FILE, content)
    except OSError as error:
        logger.warning(
            "cannot keep the state of the training in %s (%s): if it is interrupted now, it starts again from an "
            "earlier step",
            folder,
            error,
        )
        return False
    return True


def read_state(folder: Path, owner: str) -> tuple[Progressed, dict[str, torch.Tensor]] | None:
    """Return the state of an earlier start of the same run, if there is one.

    A file that cannot be read is a line in the log, and training starts again.

    Raises:
        ValueError: the folder holds the state of another run.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        progressed = Progressed(**content)
        progressed.losses = [(int(step), float(loss)) for step, loss in progressed.losses]
        progressed.validation = [(int(step), float(loss)) for step, loss in progressed.validation]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning("cannot read %s (%s): training starts again", path, error)
        return None
    if progressed.owner != owner:
        msg = (
            f"{str(folder)!r} holds an unfinished tuning of another model, other judgements or another recipe; give "
            "another folder (--out), or delete this one"
        )
        raise ValueError(msg)
    return progressed, tensors
