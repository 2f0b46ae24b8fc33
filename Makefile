# make demo    prepare, train and generate, on any machine, in minutes
# make test    all tests, in three processes: on two cores too, since many tests wait
# Both set up .venv first. PYTHON=python3.12 make ... uses another Python. TORCH=cpu, cu126, ... takes the PyTorch build
# of that name (not rocm: what that needs is on PyTorch's index alone). Without TORCH, a Linux machine without an NVIDIA
# driver gets the CPU build, which is gigabytes smaller.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-user --disable-pip-version-check --constraint constraints.txt
FITS := -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))'  # PyTorch 2.13 has no build for Python 3.15

# A build chosen with TORCH must come from PyTorch's own index. The default CPU build comes from there if possible: if
# the index is unreachable, pip warns and takes the ordinary build.
# WSL's /dev/dxg serves cards of any maker, so look for NVIDIA's library; containers in WSL have it under the second name.
WSL := /usr/lib/wsl/lib/libcuda.so.1 /usr/lib/wsl/drivers/nv*/libcuda.so.1*
DRIVER := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl $(WSL))
BUILDS := https://download.pytorch.org/whl
ifdef TORCH
TORCH_FROM := --index-url $(BUILDS)/$(TORCH)
else ifeq ($(shell uname -s)$(strip $(DRIVER)),Linux)
TORCH_FROM := --extra-index-url $(BUILDS)/cpu --retries 1 --timeout 15
endif

.PHONY: demo test lint clean
.DELETE_ON_ERROR:  # a virtual environment without pip, which Debian's python3 leaves behind, must not count as made

demo: .venv/installed
	$(BIN)/python prepare_data.py --preset demo
	$(BIN)/python train.py --preset demo --auto-resume
	$(BIN)/python generate.py --preset demo --prompt "The history of" --temperature 0.6

test: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses 3

lint: .venv/installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf .venv

.venv/bin/python:
	@test ! -e .venv/Scripts || { echo ".venv was made on Windows: rename or delete it first" >&2; exit 1; }
	@$(PYTHON) $(FITS) || { echo "$(PYTHON) is not Python 3.10 to 3.14. Name one that is: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { echo "No virtual environment. If ensurepip is missing (Debian, Ubuntu): sudo apt install $(notdir $(PYTHON))-venv. If .venv is there already, delete it: make clean" >&2; exit 1; }

.venv/installed: .venv/bin/python requirements.txt constraints.txt
	@$(BIN)/python $(FITS) && $(BIN)/python -m pip --version > /dev/null || { echo "The Python in .venv is not 3.10 to 3.14, has no pip or does not run. Unless another make is at work, delete .venv first: make clean" >&2; exit 1; }
	$(if $(TORCH_FROM),$(INSTALL) --no-deps torch $(TORCH_FROM))
	$(INSTALL) -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-fast.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@
