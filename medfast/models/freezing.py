"""Locking parts of the towers: out of the optimiser, out of autograd, never changed."""

from __future__ import annotations

from torch import nn

from medfast.errors import UsageError
from medfast.models.pair import ImageTower, TextTower


def lock_image(tower: ImageTower, unlocked_groups: int = 0) -> None:
    """Lock the image tower but for its last groups; the projection after it is trained.

    Groups are timm's, as in open_clip: the stem, then block by block, the last with the final
    norm.

    Raises:
        UsageError: the tower has fewer groups.
    """
    from timm.models import group_parameters

    trunk = tower.trunk
    groups = group_parameters(trunk, trunk.group_matcher())
    _check_count("--lock-image-unlocked-groups", unlocked_groups, len(groups), "image", "groups")
    if unlocked_groups == len(groups):
        return
    locked = [name for k in sorted(groups)[: len(groups) - unlocked_groups] for name in groups[k]]
    # Older timm counts the norm before the first block to the last group.
    locked += [name for name, _ in trunk.named_parameters() if name.startswith("norm_pre.")]
    for name in locked:
        trunk.get_parameter(name).requires_grad_(False)
    # Dropout behind the embedding has no weights by which to tell that it is locked.
    for name in ("pos_drop", "patch_drop"):
        if hasattr(trunk, name):
            setattr(trunk, name, nn.Identity())


def lock_text(tower: TextTower, unlocked_layers: int = 0) -> None:
    """Lock the text tower but for its last layers; the projection after it is trained.

    The norm after the last layer belongs to it, the embeddings before the first are always locked.

    Raises:
        UsageError: the tower has fewer layers.
    """
    layers = tower.layers
    _check_count("--lock-text-unlocked-layers", unlocked_layers, len(layers), "text", "layers")
    kept = {id(p) for layer in layers[len(layers) - unlocked_layers :] for p in layer.parameters()}
    if unlocked_layers:
        norm = getattr(tower.trunk, "final_layer_norm", None)
        kept |= {id(p) for p in norm.parameters()} if norm is not None else set()
    for parameter in tower.trunk.parameters():
        parameter.requires_grad_(id(parameter) in kept)


def _check_count(flag: str, count: int, most: int, tower: str, what: str) -> None:
    if count > most:
        raise UsageError(
            f"{flag} must be at most {most}, all {what} of the {tower} tower; got {count}."
        )
