"""What a training run needs to go on after it was killed, in one safetensors file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.utils.files import replace_file

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
        ended: why training ended; empty as long as it runs.
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


def state_owner(folder: Path) -> str | None:
    """Return whose state a folder holds; None if there is none, or it cannot be read.

    Raises:
        ValueError: the file is whole, but no state of a training.
    """
    found = _read(folder, logging.DEBUG)  # `read_state` warns
    return None if found is None else found[0].owner


def read_state(
    folder: Path, owner: str, shapes: Mapping[str, Sequence[int]], moments: Mapping[str, Sequence[int]]
) -> tuple[Progressed, dict[str, torch.Tensor]] | None:
    """Return the state of an earlier start of the same run, if there is one.

    A file that cannot be read, or lacks a part, is a line in the log, and training starts again.

    Args:
        folder: where it is kept.
        owner: digest of the run.
        shapes: of the tensors it holds.
        moments: shapes of those that are added with the first step.

    Raises:
        ValueError: the folder holds the state of another run, or a file that is no state.
    """
    found = _read(folder, logging.WARNING)
    if found is None:
        return None
    progressed, tensors = found
    if progressed.owner != owner:
        msg = (
            f"{str(folder)!r} holds an unfinished training of another model, other judgements or another recipe "
            f"({progressed.owner[:12]}, this one is {owner[:12]}); give another folder (--out), or delete this one"
        )
        raise ValueError(msg)
    wanted = {**shapes, **moments} if progressed.step else shapes
    expected = {name: tuple(shape) for name, shape in wanted.items()}
    kept = {name: tuple(tensor.shape) for name, tensor in tensors.items() if str(tensor.dtype) == "torch.float32"}
    if expected != kept:
        wrong = sorted(name for name in expected.keys() | kept.keys() if expected.get(name) != kept.get(name))
        logger.warning("%s does not fit what is trained (%s): training starts again", folder / FILE, wrong[:2])
        return None
    return found


def _read(folder: Path, level: int) -> tuple[Progressed, dict[str, torch.Tensor]] | None:
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        progressed = _progressed(json.loads(metadata["state"])) if "state" in metadata else None
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError, OverflowError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        logger.log(level, "cannot read %s (%s): training starts again", path, why)
        return None
    if progressed is None:
        msg = (
            f"{str(path)!r} is no state of a training, so it is not overwritten; move it elsewhere, or give another "
            "folder (--out)"
        )
        raise ValueError(msg)
    return progressed, tensors


def _progressed(content: Any) -> Progressed:
    """Check what a file says, field by field.

    Raises:
        TypeError, ValueError, OverflowError: a field is missing, or of another type.
    """
    found = Progressed(**content)
    for name in ("step", "best_step", "waited"):
        value = getattr(found, name)
        if type(value) is not int or value < 0:
            msg = f"{name} is {value!r:.40}"
            raise ValueError(msg)
    if not (isinstance(found.owner, str) and isinstance(found.ended, str)):
        msg = f"owner is {found.owner!r:.40}, ended is {found.ended!r:.40}"
        raise TypeError(msg)
    found.best_loss, found.seconds = float(found.best_loss), float(found.seconds)
    found.losses = [(int(step), float(loss)) for step, loss in found.losses]
    found.validation = [(int(step), float(loss)) for step, loss in found.validation]
    return found
