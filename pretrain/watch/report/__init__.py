"""report.html of a training run: python -m pretrain.watch.report RUN."""

from pretrain.watch.report.page import write_report

__all__ = ["write_report"]
