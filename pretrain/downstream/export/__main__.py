"""Hand a backbone over: python -m pretrain.downstream.export CHECKPOINT OUT --format huggingface

Formats: huggingface, timm, onnx, torch_export, torchscript, safetensors (`pretrain.downstream.export.folder`).
CHECKPOINT is a run folder, a step-* checkpoint (of any number of ranks), a teacher folder, an export, or a released
.pth with --architecture. `key=value` changes how the model is run (position_antialias=true). An export whose features
differ from ours by more than 1e-5 is refused; with --dtype float16 the difference is stated.
"""

import argparse
import logging
import sys

import yaml

from configs.messages import answered, named_folder
from pretrain.downstream.backbone import CHANGEABLE
from pretrain.downstream.export.folder import DTYPES, FORMATS, export

log = logging.getLogger("seedbed.export")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.downstream.export",
        description="Write the backbone of a checkpoint as a folder for others; check that it gives the same features.",
    )
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=named_folder, help="folder to write; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="huggingface")
    parser.add_argument("--architecture", default="", help="of a released file, which does not say")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; programs compute in it")
    parser.add_argument("--heads", action="store_true", help="the projection heads too, to train or distil from")
    parser.add_argument("--licence", default="", metavar="NAME", help="of the weights, for the card: apache-2.0")
    parser.add_argument("changes", nargs="*", metavar="key=value", help=f"one of {', '.join(CHANGEABLE)}")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    return answered(lambda: _run(arguments), "nothing was written")


def _run(arguments: argparse.Namespace) -> int:
    changes = dict(_change(text) for text in arguments.changes)
    if reserved := changes.keys() - set(CHANGEABLE):
        raise ValueError(f"{min(reserved)} belongs to the weights; an export can change {', '.join(CHANGEABLE)} only.")
    compared = export(
        arguments.checkpoint,
        arguments.out,
        arguments.format,
        arguments.architecture,
        heads=arguments.heads,
        dtype=arguments.dtype,
        licence=arguments.licence,
        **changes,
    )
    for line in compared:
        log.info(line)
    log.info("wrote %s", arguments.out)
    return 0


def _change(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not key=value.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} has no value that can be read.") from None


if __name__ == "__main__":
    sys.exit(main())
