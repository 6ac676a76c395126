"""Hand a backbone over: python -m pretrain.downstream.export CHECKPOINT OUT --format huggingface

Formats: huggingface, timm, onnx, torch_export, torchscript, safetensors (`pretrain.downstream.export.folder`).
CHECKPOINT is a run folder, a step-* checkpoint, a teacher folder, an export, or a released .pth with --architecture.
`key=value` changes how the model is run (position_antialias=true). An export whose features differ from ours by more
than 1e-5 is refused.
"""

import argparse
import logging
import sys

import yaml

from configs.messages import named_folder, sentence
from pretrain.downstream.backbone import CHANGEABLE
from pretrain.downstream.export.folder import FORMATS, export

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
    parser.add_argument("changes", nargs="*", metavar="key=value", help=f"one of {', '.join(CHANGEABLE)}")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        changes = dict(_change(text) for text in arguments.changes)
        compared = export(arguments.checkpoint, arguments.out, arguments.format, arguments.architecture, **changes)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
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
