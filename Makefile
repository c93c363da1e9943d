PROFILE ?= laptop
OUT ?= runs/$(PROFILE)
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
REPRODUCE := $(BIN)/python -m flowerlib.lab.reproduce
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)
export GOMP_SPINCOUNT ?= 3000
GIVEN = $(if $(PARAMETERS),-p $(PARAMETERS)) $(if $(DATA),-p data_path='$(DATA)')
NAMES := PROFILE OUT PARAMETERS DATA NOTEBOOKS PYTHON PIP_ARGS BIN GOMP_SPINCOUNT
MISSPELT := $(filter-out $(NAMES) SHELL MAKEFLAGS,$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
$(if $(MISSPELT),$(error no rule here reads $(MISSPELT): the variables are $(NAMES); one of the environment stands before make))

.PHONY: lab reproduce study report test test-hard test-browser bench publish
lab: .venv/ready
	$(BIN)/python -m jupyterlab --ServerApp.ip=127.0.0.1 $(AS_ROOT) notebooks/00_follow_the_flow.ipynb

reproduce: .venv/ready
	$(REPRODUCE) --profile $(PROFILE) --out $(OUT) $(GIVEN)

study: .venv/ready
	$(REPRODUCE) --profile study --out runs/study$(addprefix -,$(notdir $(DATA:/=))) $(GIVEN) \
	  $(addprefix --only ,01_prepare_the_data 02_train_sft 03_train_flower 04_bias_and_diversity 07_which_title_next) \
	  $(if $(DATA),,--only 05_fit_a_known_distribution)

report: .venv/ready
	$(BIN)/python -m flowerlib.lab.report --out $(OUT)

test: .venv/ready
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-hard: .venv/ready
	FLOWERLIB_HARD=1 $(BIN)/python -m pytest -rA -n auto --maxprocesses 4 --dist loadfile tests/hostile

test-browser: .venv/ready
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) playwright==1.65.2
	command -v chromium || command -v chromium-browser || command -v google-chrome || (apt-get update -qq && apt-get install -qq -y chromium >/dev/null) \
	  || echo "chromium could not be installed here, so the browser tests are skipped: install it by hand"
	$(BIN)/python -m pytest -rs tests/browser/browse_*.py

bench: .venv/ready
	$(BIN)/python -m pytest tests/benchmarks/bench_*.py --benchmark-enable --benchmark-only

publish: .venv/ready
	$(BIN)/python notebooks/publish.py $(NOTEBOOKS)

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	@echo "setting up .venv, once: one to three minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	touch $@
