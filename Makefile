# `make pretrain` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
OUT ?= outputs/pretrain
CONFIG ?= training/configs/smoke.yaml
ARGS ?=
ACCELERATE ?= training/accelerate/$(if $(shell command -v nvidia-smi),gpu-bf16,cpu).yaml

.PHONY: help install pretrain test test-oldest test-newest test-oldest-subset conformance-oldest conformance-newest notebooks browser docs chaos conformance lint types wheel smoke-wheel check clean

help:
	@echo "make install                  set up .venv with everything; then: source .venv/bin/activate"
	@echo "make pretrain                 pretrain on the embedded default: simulated pairs, six real ones held out"
	@echo "make pretrain DATA=<folder>   pretrain on your shards, or on a BigEarthNet v1 or reBEN archive"
	@echo "              CONFIG=<yaml> OUT=<folder> ARGS='--num_train_epochs 3'   change the run"
	@echo "make test                     unit tests"
	@echo "make test-oldest test-newest  the tests on the oldest and on today's newest releases that are allowed"
	@echo "make test-oldest-subset       a few of them, on the oldest releases laid over .venv"
	@echo "make notebooks                run the three notebooks"
	@echo "make browser                  drive the demo page in a real browser (needs chromium)"
	@echo "make docs                     build the documentation into site/, links checked"
	@echo "make conformance              transformers' own tests on our models"
	@echo "make chaos                    inject faults into training runs: kills, damaged shards, full disk, NaN (15 minutes)"
	@echo "              ARGS='--times 1'                           one trial of each; ARGS=--help says the rest"
	@echo "make check                    everything that CI runs"

# --- set-up -----------------------------------------------------------------------------------------------------------

# bigearthnet-common carries six real BigEarthNet pairs and the official split lists; its code and what that needs stay out.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed, but there is no $(PYTHON). Name yours: make PYTHON=<python> ..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, but $(PYTHON) is older. Name another: make PYTHON=<python> ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[app,cluster,data,docs,export,test,train]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps bigearthnet-common==2.8.0
	@touch $@

install: $(VENV)/.installed

# --- the main job -----------------------------------------------------------------------------------------------------

pretrain: install
	$(BIN)/accelerate launch --config_file $(ACCELERATE) training/run_pretrain.py $(CONFIG) \
		--output_dir $(OUT) $(if $(DATA),--data "$(DATA)") $(ARGS)

# --- tests ------------------------------------------------------------------------------------------------------------

test: install
	$(BIN)/python -m pytest -n auto --ignore tests/conformance -m "not notebooks and not browser" $(ARGS)

# The ends of the range of versions. Left out: transformers' own tests, which `make conformance-oldest` and
# `conformance-newest` run, and the server that plays the Hub, which speaks to one release.
$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e ".[data,test,train]"
	@touch $@

NEWEST_PYTHON := $(shell python3.13 -c '' 2>/dev/null && echo python3.13 || echo $(PYTHON))
$(VENV)-newest/.installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check $$(grep ^torch== constraints.txt) \
		-e ".[data,test,train]"
	@touch $@

ENDS_OF_RANGE := tests/modeling tests/shards tests/data tests/preparation tests/training tests/evaluation \
	tests/test_imports.py tests/test_goldens.py tests/test_shipped_checkpoint.py

test-oldest test-newest: test-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pytest -n auto $(ENDS_OF_RANGE) $(ARGS)
	$(VENV)-$*/bin/accelerate launch --config_file $(ACCELERATE) training/run_pretrain.py $(CONFIG) \
		--output_dir outputs/pretrain-$* --max_steps 20 --eval_steps 10

# Building an environment takes minutes. This lays the oldest releases over those of .venv: what is on PYTHONPATH goes
# first, metadata included, and torch is the same.
OLDEST := .cache/oldest
$(OLDEST)/.installed: constraints-oldest.txt | install
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) \
		$$(grep == $< | grep -v ^torch==)
	@touch $@

SUBSET := tests/test_goldens.py tests/modeling/test_modeling.py tests/shards/test_rows.py tests/shards/test_shards.py \
	tests/shards/test_streams.py tests/training/test_trainer.py

test-oldest-subset: install $(OLDEST)/.installed
	PYTHONPATH=$(abspath $(OLDEST)) $(BIN)/python -m pytest -n auto -m "not slow" $(SUBSET) $(ARGS)

notebooks: install
	$(BIN)/python -m pytest -m notebooks tests/test_notebooks.py $(ARGS)

browser: install
	$(BIN)/python -m pytest -m browser tests/app $(ARGS)

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# `make check` tries each fault once; the last --times counts, so ARGS may say another number.
TIMES := 5
check: TIMES := 1

chaos: install
	$(BIN)/python -m tests.chaos --times $(TIMES) $(ARGS)

TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
UPSTREAM := .cache/transformers-tests-$(TRANSFORMERS)

$(UPSTREAM)/tests/test_modeling_common.py: | install
	@mkdir -p .cache/sdist $(UPSTREAM)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
		--dest .cache/sdist transformers==$(TRANSFORMERS)
	tar --extract --gzip --touch --file .cache/sdist/transformers-$(TRANSFORMERS).tar.gz --directory $(UPSTREAM) \
		--strip-components=1 transformers-$(TRANSFORMERS)/tests

conformance: install $(UPSTREAM)/tests/test_modeling_common.py
	$(BIN)/python -m pytest -m conformance tests/conformance $(ARGS)

conformance-oldest conformance-newest: conformance-%: $(VENV)-%/.installed
	$(MAKE) -o install conformance BIN=$(VENV)-$*/bin TRANSFORMERS=$$($(VENV)-$*/bin/python -c \
		"from importlib.metadata import version; print(version('transformers'))")

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# --- packaging: the wheel in an environment of its own, where the type checker can follow the mapped folders ----------

wheel: install
	rm -rf dist build
	$(BIN)/python -m build --outdir dist .

$(VENV)-wheel/.installed: wheel
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	@touch $@

types: $(VENV)-wheel/.installed
	cd $(VENV)-wheel && ../$(BIN)/mypy --config-file ../setup.cfg --python-executable bin/python -p fusmae_hf

check: lint types docs test notebooks browser chaos conformance smoke-wheel

smoke-wheel: $(VENV)-wheel/.installed
	cd $(VENV)-wheel && bin/python -c "import fusmae_hf; print('wheel:', fusmae_hf.__version__)"
	cd $(VENV)-wheel && bin/fusmae --version
	cd $(VENV)-wheel && bin/fusmae doctor
	cd $(VENV)-wheel && bin/python -m fusmae_hf.training.run_pretrain --help > /dev/null
	cd $(VENV)-wheel && bin/python -m fusmae_hf.training.run_finetune --help > /dev/null
	cd $(VENV)-wheel && bin/python -m fusmae_hf.training.run_probe --help > /dev/null

clean:
	rm -rf $(VENV) $(VENV)-wheel build dist site .cache *.egg-info
