# Everything sets itself up: one virtual environment, built once and reused while pyproject.toml is unchanged.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo demo-curation test test-fast check bench clean
.DELETE_ON_ERROR:

# Raw pool -> shards -> a small backbone -> Hugging Face folder -> the pool again, embedded with that backbone.
demo: .venv/.curation,pretrain,export
	$(PY) -m curation.run --seed demo
	$(PY) -m pretrain.train --config demo --data runs/demo/shards --out runs/demo-train
	# A second time it is there; one of another training is refused by name, and yours to remove.
	test runs/demo-teacher -nt runs/demo-train/teacher/config.json || \
	    $(PY) -m pretrain.downstream.export runs/demo-train runs/demo-teacher --format huggingface
	$(PY) -m curation.run --config demo --pool 'runs/demo/demo/pool/*.tar' --seed runs/demo/demo/seed \
	    --evaluation runs/demo/demo/evaluation --out runs/demo-again embed.encoder=hf:runs/demo-teacher
	$(PY) -m curation.demo.figures runs/demo/demo/truth.csv runs/demo runs/demo-train runs/demo-again

# Its first line alone: no torch.
demo-curation: .venv/.curation
	$(PY) -m curation.run --seed demo

# Two processes, a file each: one alone leaves more than half of two cores idle.
test: .venv/.dev
	$(PY) -m pytest -n 2 --dist loadfile

test-fast: .venv/.dev
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow"

check: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

bench: .venv/.dev
	$(PY) -m benchmarks.all

clean:
	rm -rf .venv

.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Seedbed needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name one with PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[$*]'
	# An independent DINO, iBOT and KoLeo for the tests. Without its dependencies, which the parts used here do not need: its
	# hydra-core and pytorch-lightning send pip through every version of every package.
	case '$*' in *dev*) $(PY) -m pip install --quiet --no-deps 'lightly==1.6.0' lightning-utilities ;; esac
	touch $@
