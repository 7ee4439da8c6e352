"""Low-rank adapters in the encoder, through peft: trained in place of its weights, merged into them at the end."""

import re

from ..modeling_speechcl import SpeechCLHeadModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def check_targets(targets: list[str]) -> None:
    """Refuse what is no linear layer of the Transformer."""
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"lora_targets: found {', '.join(unknown)}, expected names among {', '.join(TARGETS)}")
    if not targets:
        raise ValueError(f"lora_targets: expected one name at least of {', '.join(TARGETS)}")


def import_peft():
    """The package peft.

    Raises:
        ModuleNotFoundError: it is not installed; says how to.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lora_rank needs the package peft, which is not installed: pip install hf_speechcl[lora], or leave it out"
        ) from error
    return peft


def add_lora(model: SpeechCLHeadModel, rank: int, alpha: float, targets: list[str]):
    """Freeze the encoder and put adapters beside its linear layers; the head goes on to be trained.

    The model stays of its class, and its checkpoints hold all weights, so a run resumes as any other.

    Args:
        rank: of the adapters.
        alpha: what they add to the output is scaled by alpha / rank.
        targets: names of linear layers, of `TARGETS`.

    Returns:
        peft's `LoraModel`; its `merge_and_unload()` makes the model an ordinary one again.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    peft = import_peft()
    names = rf"speechcl\.layers\..*\.({'|'.join(map(re.escape, targets))})"
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    tuner = peft.LoraModel(model, config, "default")
    for name, parameter in model.named_parameters():
        if not name.startswith("speechcl."):
            parameter.requires_grad_(True)
    return tuner
