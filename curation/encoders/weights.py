"""Where an encoder's weights lie: a local file, a model folder, or the Hugging Face cache; checked before they load.

Only safetensors, and torch files that hold tensors alone, are ever read: a pickle may run code.
"""

import difflib
import functools
import hashlib
import json
import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path

HF_MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
DESCRIPTOR_NAMES = ("descriptors", "descriptors-likeness", "copies")
OFFLINE_CHOICES = ", ".join(
    [
        f"--config offline (of {', '.join(DESCRIPTOR_NAMES)}; no weights)",
        "hf:/folder",
        "timm:NAME@/path/weights.safetensors",
        "sscd:/path/file.torchscript.pt",
    ]
)


def require_timm_name(name: str) -> None:
    """ValueError with the nearest names for one that timm does not have."""
    import timm

    # A tag that timm does not list would load without a word, as untrained weights.
    if name in timm.list_models() or name in timm.list_pretrained():
        return
    known = [*DESCRIPTOR_NAMES, *timm.list_pretrained(), *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.3)
    raise ValueError(
        f"encoder {name!r} is neither {', '.join(DESCRIPTOR_NAMES)} nor a timm model; nearest: "
        f"{', '.join(near) or 'none'}."
    )


def require_weights_file(path: str, other_suffixes: tuple[str, ...]) -> None:
    """ValueError for a file that does not exist or is neither safetensors nor one of the suffixes."""
    known = (".safetensors", *other_suffixes)
    if not os.path.isfile(path):
        raise ValueError(f"weights file {path} does not exist.")
    if not path.endswith(known):
        raise ValueError(f"weights file {path} is of no safe kind; expected one of {', '.join(known)}.")


def find_hub_weights(name: str) -> str:
    """Path of a timm model's safetensors in the Hugging Face cache, fetched if it is not there."""
    import timm
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise ValueError(
            f"timm model {name!r} has no weights on the hub; give a file: timm:{name}@/path/weights.safetensors."
        )
    for filename in (config.hf_hub_filename, "model.safetensors"):
        found = filename and try_to_load_from_cache(config.hf_hub_id, filename)
        if isinstance(found, str):
            return found
    reason = "no network"
    if _is_reachable(constants.ENDPOINT):
        try:
            return hf_hub_download(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
        except Exception as error:  # the hub raises a dozen types, all of which mean the same to the user
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise ValueError(
        f"encoder {name!r}: weights of {config.hf_hub_id} are not in the cache ({constants.HF_HUB_CACHE}) and could "
        f"not be fetched from {constants.ENDPOINT} ({reason}); offline choices: {OFFLINE_CHOICES}."
    )


def _is_reachable(url: str) -> bool:
    """Whether trying is worth it: the hub client alone retries for half a minute before it says no."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    parts = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def hf_weights(folder: Path) -> Path:
    """The folder's one safetensors file, after checking that its model is one we know."""
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{folder} is not a model folder: its config.json cannot be read: {error}") from error
    if model_type not in HF_MODEL_TYPES:
        raise ValueError(f"hf:{folder} holds model_type {model_type!r}; known: {', '.join(HF_MODEL_TYPES)}.")
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"hf:{folder} has no model.safetensors; save it with save_pretrained (one shard).")
    return folder / "model.safetensors"


@functools.cache
def file_sha256(path: str) -> str:
    """Hex digest of a file's bytes; read once per process."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
