"""Puts all checks together: what `kalm-rag doctor` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kalm_rag.diagnosis.card import EXAMPLES
from kalm_rag.diagnosis.findings import Finding
from kalm_rag.diagnosis.hub import Hub, look_at_hub
from kalm_rag.diagnosis.installation import check_machine, check_packages, installed_extras
from kalm_rag.diagnosis.place import CachePlace, look_at_cache
from kalm_rag.diagnosis.precision import Precisions, measure_precisions
from kalm_rag.diagnosis.privacy import scrubber
from kalm_rag.diagnosis.verify import Verification, verify
from kalm_rag.model.checkpoint import ALIASES, find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.model.loading import resolve_device
from kalm_rag.utils.budget import MemoryBudget, memory_budget
from kalm_rag.utils.machine import FRAMEWORKS, PACKAGES, Machine, this_machine, utc_now, versions
from kalm_rag.utils.paths import DEFAULT


@dataclass(slots=True)
class Diagnosis:
    """Everything that was looked at.

    Attributes:
        date: in UTC.
        machine: the machine.
        versions: of Python and the packages.
        extras: by extra, the packages that it still needs.
        precisions: times of each precision.
        prefill_memory: what `prefill_memory="auto"` would come to now; a model's weights, once loaded, leave less.
        cache: the cache's place.
        hub: settings of the model hub.
        findings: what is wrong or good to know, the worst first.
        model: digests and place of the model, if one was named and found.
        verification: what was verified of it.
    """

    date: str
    machine: Machine
    versions: dict[str, str]
    extras: dict[str, list[str]]
    precisions: Precisions
    prefill_memory: MemoryBudget
    cache: CachePlace
    hub: Hub
    findings: list[Finding]
    model: dict[str, str] = field(default_factory=dict)
    verification: Verification | None = None

    @property
    def is_usable(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return everything for a fault report: no tokens, no passwords, and `~` for the home folder."""
        found: dict[str, Any] = scrubber()(
            {
                "usable": self.is_usable,
                "date": self.date,
                "machine": self.machine.as_json(),
                "versions": self.versions,
                "missing_for_extras": self.extras,
                "precision": self.precisions.as_json(),
                "prefill_memory": asdict(self.prefill_memory),
                "cache": self.cache.as_json(),
                "hub": self.hub.as_json(),
                "findings": [asdict(finding) for finding in self.findings],
                "model": self.model or None,
                "verification": None if self.verification is None else self.verification.as_json(),
            }
        )
        return found


def diagnose(
    model: str | None = None,
    *,
    revision: str | None = None,
    lora: str | None = None,
    cache: str = DEFAULT,
    device: str | None = None,
    card: str | None = None,
) -> Diagnosis:
    """Check this installation, and a model if one is named.

    Nothing is downloaded unless a model is named that is not on this disk, and no cache is created.

    Args:
        model: as in `KaLMReranker`.
        revision: as in `KaLMReranker`.
        lora: as in `KaLMReranker`.
        cache: the folder to look at.
        device: where to measure and to run the model; default as in `KaLMReranker`.
        card: the hub id of the release that `model` is a copy of, if its folder does not tell.

    Raises:
        ValueError: there is no such device, or no example of that card.
    """
    if card is not None and card not in EXAMPLES:
        msg = f"card must be a release whose model card publishes an example ({', '.join(EXAMPLES)}), got {card!r}"
        raise ValueError(msg)
    place = resolve_device(device)
    machine = this_machine()
    precisions = measure_precisions(place)
    budget = memory_budget("auto", place)
    seen, cache_findings = look_at_cache(cache)
    hub, hub_findings = look_at_hub()
    findings = [*check_packages(), *check_machine(machine, precisions, budget), *cache_findings, *hub_findings]
    found = Diagnosis(
        utc_now(),
        machine,
        versions((*PACKAGES, *FRAMEWORKS)),
        installed_extras(),
        precisions,
        budget,
        seen,
        hub,
        findings,
    )
    if model is not None:
        _check_model(found, model, revision, lora, str(place), card)
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    return found


def _check_model(
    found: Diagnosis, model: str, revision: str | None, lora: str | None, device: str, card: str | None
) -> None:
    try:
        checkpoint = find_checkpoint(model, revision=revision, lora=lora)
        identity = identify(checkpoint)
        found.model = {
            "name": model,
            "folder": str(checkpoint.folder),
            **({} if checkpoint.lora is None else {"adapter": str(checkpoint.lora.folder)}),
            "digest": identity.short,
            "encoder_digest": identity.encoder,
            "decoder_digest": identity.decoder,
            "tokenizer_digest": identity.tokenizer,
        }
        verification = verify(checkpoint, resolve_device(device), card=card or ALIASES.get(model, model))
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        found.findings.append(Finding("error", "model", f"{error}."))
        return
    found.verification = verification
    found.findings += [Finding("error", "model", fault) for fault in verification.faults]
    found.findings += [Finding("warning", "model", gap) for gap in verification.gaps]
