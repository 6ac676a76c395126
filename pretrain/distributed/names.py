"""Parameter names as the plain model has them, whatever it is wrapped in."""

WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def plain_name(name: str) -> str:
    """`module.backbone.blocks.0._orig_mod.norm1.weight` -> `backbone.blocks.0.norm1.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
