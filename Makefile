# make train    set up, prepare the built-in corpus, train recipes/quickstart.yaml (a second call continues or skips)
# make test     set up, check the style, run the tests
# make install  the set-up alone: .venv with the pinned dependencies
# make lint     style check;  make clean  remove the set-up and caches (runs/ and corpora/ stay)
#
# PYTHON=...       the interpreter to use (3.11 or 3.12)
# TORCH_INDEX=URL  a further package index for torch, for another build of it (CPU only, another CUDA)
# WORKERS=N        test processes

PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)
TORCH_INDEX ?=
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/installed
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
RECIPE := recipes/quickstart.yaml

.PHONY: train test install lint clean
.DELETE_ON_ERROR:

train: install
	$(BIN)/farspan data prepare $(RECIPE)
	$(BIN)/farspan train $(RECIPE) --resume

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: farspan needs Python 3.11 or 3.12, and none of python3, python3.12," \
		"python3.11 is one; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
		echo "error: $(PYTHON) is not Python 3.11 or 3.12; name another: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv || { rm -rf .venv; \
		echo "error: $(PYTHON) cannot make a virtual environment; install its venv package" \
		"(Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt "$(TORCH)"
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
