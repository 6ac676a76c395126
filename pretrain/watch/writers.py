"""Where else a line of figures goes: TensorBoard and Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Writer(Protocol):
    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files under `<folder>/tensorboard`; what an earlier try wrote beyond `start_step` is hidden.

    Raises:
        ValueError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "watch.tensorboard=true needs the package tensorboard: pip install tensorboard, or set it to false."
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run, named after the run folder, which a resumed training continues.

    Raises:
        ValueError: the package `wandb` is not installed.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # optional, and imported for those who ask for it
        except ImportError:
            raise ValueError(
                f"watch.wandb_project={project} needs the package wandb: pip install wandb, or leave it empty."
            ) from None
        identity = folder / "wandb_id.txt"
        if not identity.exists():
            identity.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=identity.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
