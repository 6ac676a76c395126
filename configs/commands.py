"""seedbed COMMAND ...: every command of the installed package, from any folder.

`python -m pretrain.train` looks for modules in the working folder first, where somebody's own `configs` would stand
before ours. This does not look there.
"""

import importlib
import sys

COMMANDS = {
    "curate": ("curation.run", "a pool of images in, shards out"),
    "explain": ("curation.explain", "one image's story in a curation run"),
    "train": ("pretrain.train", "shards or images in, a teacher out"),
    "launch": ("pretrain.launch", "a training on Slurm"),
    "replay": ("pretrain.replay", "a step that went wrong, again"),
    "report": ("pretrain.watch.report.__main__", "report.html of a training, anew"),
    "export": ("pretrain.downstream.export.__main__", "a backbone for other libraries"),
    "features": ("pretrain.downstream.features", "features of a set of images, as files"),
    "serve": ("pretrain.downstream.serve.__main__", "embeddings over HTTP"),
    "pca": ("pretrain.downstream.pca", "pictures of what a backbone sees"),
    "explore": ("pretrain.downstream.explore.__main__", "a page on which to ask what resembles what"),
    "evaluate": ("pretrain.downstream.evals.__main__", "how good backbones are, side by side"),
}
"""name -> module with a `main`, and what it does"""


def main() -> int:
    """Run the command that the first argument names; 2 where there is none."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        asked_for_help = name in ("", "-h", "--help")
        told = sys.stdout if asked_for_help else sys.stderr
        if not asked_for_help:
            print(f"error: seedbed has no command {name!r}.", file=told)
        print("usage: seedbed COMMAND ..., and seedbed COMMAND --help. Commands:", file=told)
        for known, (module, what) in COMMANDS.items():
            print(f"  {known:10} {what} (python -m {module.removesuffix('.__main__')})", file=told)
        return 0 if name in ("-h", "--help") else 2
    module = importlib.import_module(COMMANDS[name][0])
    return int(module.main(sys.argv[2:]) or 0)
