# `make demo` and `make test` work from a fresh clone: they need Python >= 3.10, make and a C++20
# compiler, and make a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE = $(shell find csrc -name '*.h' -o -name '*.cc' -o -name '*.cu')
BUILT := $(VENV)/.built
TORCHED := $(VENV)/.torch
# A build of torch for CPUs where there is no GPU: a bare `torch` pulls gigabytes of CUDA.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
CXX ?= g++

.PHONY: all demo test test-all lint format bench vllm vllm-all sglang sglang-all sanitize fuzz wheel clean tools
all: lint test

tools:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing: install Python 3.10 or newer"; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "make: $(CXX) is missing: install a C++20 compiler (Debian: apt-get install g++)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is older than 3.10"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: Python lacks venv (Debian: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "make: Python.h is missing (Debian: apt-get install python3-dev)"; exit 1; }

$(BUILT): pyproject.toml setup.py $(NATIVE) | tools
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

$(TORCHED): $(BUILT)
	$(BIN)/pip install -q '$(TORCH)' 'transformers>=4.57'
	touch $@

# The main job: prefill and decode workers on one store, cold, warm from DRAM, warm from SSD.
demo: $(TORCHED)
	$(BIN)/kvstore demo $(ARGS)

test: $(TORCHED)
	$(BIN)/python -m pytest $(ARGS)

# With the suites that kill writers and shut file systems down (some need root). What needs more than
# this has commands of its own: `pytest -m rdma tests/rdma` (qemu, see its README), bench/gpu_check.sh
# (a GPU). Transports are in both suites, over whatever libucp there is: for a run with the wheel's,
# `pip install -e '.[ucx]'`, and `pytest -m "not gpu and not rdma" tests/transport`.
test-all: $(TORCHED)
	$(BIN)/python -m pytest -m 'not gpu and not vllm and not sglang and not redis and not rdma' --timeout 900 $(ARGS)

lint: $(TORCHED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/stubtest kvstore._native --allowlist tests/stubtest_allowlist.txt
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(BUILT)
	$(BIN)/ruff check -q --fix-only .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(TORCHED)
	$(BIN)/kvstore bench $(ARGS)

# Real vLLM engines on a CPU, in an environment of their own (Python 3.11 or newer). The requirement
# file is a part of what vLLM asks for, hence --no-deps; the last line must not move what it pins.
VLLM_VENV ?= .venv-vllm
VLLM_PINS := tests/adapters/vllm/requirements.txt
$(VLLM_VENV)/.built: $(VLLM_PINS) pyproject.toml setup.py $(NATIVE) | tools
	test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q torch==2.13.0
	$(VLLM_VENV)/bin/pip install -q --no-deps -r $(VLLM_PINS)
	$(VLLM_VENV)/bin/pip install -q -e '.[test]' -c $(VLLM_PINS)
	touch $@

vllm: $(VLLM_VENV)/.built
	$(VLLM_VENV)/bin/python -m pytest -m "vllm and not slow" $(ARGS)

# With two OpenAI servers and the slower modes: some twenty engines more.
vllm-all: $(VLLM_VENV)/.built
	$(VLLM_VENV)/bin/python -m pytest -m vllm $(ARGS)

# Real SGLang on a CPU, likewise. It hashes pages by an extension that it builds at its first start,
# which needs OpenSSL's headers; stubs stand in for packages without a build for CPUs.
SGLANG_VENV ?= .venv-sglang
SGLANG_PINS := tests/adapters/sglang/requirements.txt
$(SGLANG_VENV)/.built: $(SGLANG_PINS) pyproject.toml setup.py $(NATIVE) | tools
	@echo '#include <openssl/sha.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || { echo "make: OpenSSL's headers are missing (Debian: apt-get install libssl-dev)"; exit 1; }
	test -d $(SGLANG_VENV) || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install -q torch==2.13.0
	$(SGLANG_VENV)/bin/pip install -q --no-deps -r $(SGLANG_PINS)
	$(SGLANG_VENV)/bin/pip install -q -e '.[test]' -c $(SGLANG_PINS)
	touch $@

sglang: $(SGLANG_VENV)/.built
	PATH="$(abspath $(SGLANG_VENV))/bin:$$PATH" OMP_NUM_THREADS=1 $(SGLANG_VENV)/bin/python -m pytest -m "sglang and not slow" $(ARGS)

# With whole engines in processes of their own.
sglang-all: $(SGLANG_VENV)/.built
	PATH="$(abspath $(SGLANG_VENV))/bin:$$PATH" OMP_NUM_THREADS=1 $(SGLANG_VENV)/bin/python -m pytest -m sglang $(ARGS)

# Native code under AddressSanitizer and UBSan through the Python tests, then the threaded C++ tests
# under ThreadSanitizer. Torch is kept out: it is not instrumented.
SANITIZED := build/asan
TSAN_FLAGS := -std=c++20 -O1 -g -UNDEBUG -fsanitize=thread -Icsrc -pthread
# $(call objects,DIRECTORY,COMPILER AND FLAGS): the native code that knows no Python, compiled once.
objects = mkdir -p $(1) && printf '%s\n' csrc/core/*.cc csrc/copy/*.cc csrc/net/*.cc | xargs -P "$$(nproc)" -I{} sh -c '$(2) -c {} -o $(1)/$$(basename {} .cc).o'
sanitize: $(BUILT)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r kvstore adapters csrc tests bench deploy docs examples setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/kvstore/*.so
	cd $(SANITIZED) && KVSTORE_SANITIZE=address,undefined $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0:log_path=found UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=found PYTHONPATH=.:adapters \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider --timeout 600 --ignore tests/unit/test_deploy.py tests/unit tests/property tests/contract tests/transport/test_bulk.py tests/transport/test_contract.py \
	  || { head -n 60 found.*; exit 1; }
	$(call objects,build/tsan,$(CXX) $(TSAN_FLAGS))
	for t in csrc/tests/*_test.cc; do echo "tsan $$t"; \
	  $(CXX) $(TSAN_FLAGS) $$t build/tsan/*.o -o build/tsan/test && TSAN_OPTIONS=halt_on_error=1 build/tsan/test || exit 1; done

# Each parser that meets bytes we did not write, for SECONDS each. Python parsers by atheris (CPython
# 3.11 or older), native ones by libFuzzer, which needs clang with its runtime. Pointer overflow is not
# checked: hashing without copying adds offsets to a destination that is null and never used.
SECONDS ?= 60
FUZZ_CXX ?= $(shell command -v clang++-19 || command -v clang++)
FUZZ_FLAGS := -std=c++20 -O1 -g -UNDEBUG -fsanitize=address,undefined -fno-sanitize=pointer-overflow -fno-sanitize-recover=all -Wno-deprecated-declarations -Icsrc -pthread
fuzz: $(BUILT)
	$(BIN)/pip install -q 'atheris>=3'
	mkdir -p build
	for t in segment index superblock config messages; do echo "fuzz $$t"; \
	  $(BIN)/python -m tests.fuzz.run $$t $(SECONDS) > build/fuzz-$$t.log 2>&1 || { tail -n 60 build/fuzz-$$t.log; exit 1; }; \
	  grep "stat::" build/fuzz-$$t.log; done
	$(call objects,build/fuzz/objects,$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link)
	for t in csrc/fuzz/*_fuzz.cc; do n=$$(basename $$t _fuzz.cc); echo "fuzz $$n"; mkdir -p build/fuzz/$$n; \
	  $(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=fuzzer $$t build/fuzz/objects/*.o -o build/fuzz/$$n-fuzz && \
	  build/fuzz/$$n-fuzz -max_total_time=$(SECONDS) -timeout=10 -print_final_stats=1 -artifact_prefix=build/fuzz/$$n- build/fuzz/$$n tests/fuzz/corpus/$$n > build/fuzz-$$n.log 2>&1 \
	  || { tail -n 60 build/fuzz-$$n.log; exit 1; }; grep "stat::" build/fuzz-$$n.log; done

wheel: $(BUILT)
	$(BIN)/pip install -q build
	$(BIN)/python -m build -o dist .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) build dist *.egg-info kvstore/*.so
