"""report.html of a training run: python -m pretrain.watch.report RUN."""
