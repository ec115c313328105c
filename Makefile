## make run      prepare data, execute the notebooks, list what came out (the first time: install)
## make check    style, notebooks without outputs, and the quick tests
## make test     everything: also trainings, two processes, notebooks, a browser
## make lab      open JupyterLab
## make app      the explorer alone, as a page
## make bench    what two scales cost on this machine, side by side and against the last time:
##               about 15 minutes; ARGS=--long: up to an hour
## make bench-gpu  on a CUDA GPU: correctness, ratios, accuracies; with $(PYTHON) as it is, no network
## make docs/story.png docs/explorer.png   the README's pictures, from what make run made
## make format   rewrite code and notebooks in the house style
## make clean    remove the virtual environment and caches; never runs/ or data/
##
## DATA=cub ROOT=folder   another dataset; OUT=folder: another place for what is made
## PRESET=paper           other settings: small (the default), paper or tiny
## STORY=folder            the trained run that docs/story.png shows
## PYTHON=python3.12      another interpreter for the virtual environment; VENV=folder: another one
## ARGS='...'             further arguments; run: ARGS='epochs=5 seeds=[0,1]', any setting or notebook
##                        parameter; test: pytest's; lab: JupyterLab's

PYTHON ?= python3
VENV ?= .venv
DATA ?= diagnostic
ROOT ?= data/$(DATA)
OUT ?= runs/$(DATA)
PRESET ?= small
ARGS ?=
RUN = $(VENV)/bin/python -m

.PHONY: help run style check test lab app bench bench-gpu format clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

run: $(VENV)/.installed
	$(RUN) ramslib notebooks --data "$(DATA)" --root "$(ROOT)" --out "$(OUT)" --preset "$(PRESET)" $(ARGS)

style: $(VENV)/.installed-test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) nbstripout --verify notebooks/*.ipynb

check: style
	$(RUN) pytest -m "not slow" $(ARGS)

test: style
	$(RUN) pytest $(ARGS)

lab: $(VENV)/.installed
	root=; [ "$$(id -u)" != 0 ] || root=--allow-root; \
	$(RUN) jupyterlab --LabApp.default_url=/lab/tree/notebooks $$root $(ARGS)

app: $(VENV)/.installed
	$(RUN) ramslib app --data "$(DATA)" --root "$(ROOT)" --out runs $(ARGS)

bench: $(VENV)/.installed
	$(RUN) benchmarks $(ARGS)

bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

docs/story.png: $(VENV)/.installed
	$(VENV)/bin/python docs/draw_story.py "$@" "$(STORY)"

docs/explorer.png: $(OUT)/results.csv $(VENV)/.installed-test
	$(VENV)/bin/python tests/take_picture.py "$@" "$(DATA)" "$(ROOT)" "$(OUT)"

format: $(VENV)/.installed-test
	$(RUN) ruff check --fix-only --quiet .
	$(RUN) ruff format .
	$(RUN) nbstripout notebooks/*.ipynb

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find ramslib tests benchmarks -name __pycache__ -prune -exec rm -rf {} +; rm -rf notebooks/.ipynb_checkpoints

# A stamp older than pyproject.toml makes pip look again; a working environment is kept.
$(VENV)/.installed: pyproject.toml
	@$(RUN) pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is not there or older than 3.11; name a newer one: make PYTHON=python3.12" >&2; \
	    exit 1; }; \
	  $(PYTHON) -m venv "$(VENV)" || { \
	    echo "no virtual environment: install Python's venv package, remove $(VENV), try again" >&2; \
	    exit 1; }; \
	  echo "Installing into $(VENV), once; on Linux torch comes with CUDA, about 6 GB on disk"; }
	$(RUN) pip install --disable-pip-version-check -e .
	@touch "$@"

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) pip install --disable-pip-version-check -e '.[test]'
	@touch "$@"
