# make book   create the environment, execute every chapter, build _build/html/index.html
# make test   run the tests             make lab    open JupyterLab on the notebooks
# make gpu    record what a GPU can do with the kernels, in MINUTES=9; run it again to go on
# make gpu-train   train the 162M model there under the structures, in MINUTES=9, on the text in CORPUS=…; again to go on
# make clean  delete _build (with the rows measured here)       make distclean  also the environment and npm's files
#
# make book DEVICE=cuda PRESET=full THREADS=2 JOBS=1 TIMEOUT=36000     passed on to the chapters and their execution
# make book PYTHON=python3.12 VENV=.venv312                            another interpreter, another environment

PYTHON  ?= python3
VENV    ?= .venv
DEVICE  ?= cpu
PRESET  ?= default
THREADS ?= 1
JOBS    ?=
TIMEOUT ?=
MINUTES ?= 9
CORPUS  ?=

comma   := ,
EXTRAS  ?= book,test$(if $(filter cuda%,$(DEVICE)),$(comma)gpu)
BIN     := $(VENV)/bin
READY   := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
VENDOR  := book/_assets/vendor
WIDGETS := node_modules/@jupyter-widgets/html-manager/dist

.PHONY: book test lab gpu gpu-train clean distclean
.DELETE_ON_ERROR:

book: $(READY) $(VENDOR)/.complete
	$(BIN)/python book/build.py --device $(DEVICE) --preset $(PRESET) --threads $(THREADS) \
		$(if $(JOBS),--jobs $(JOBS)) $(if $(TIMEOUT),--timeout $(TIMEOUT))

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lab: $(READY)
	SPARSESURVEY_ROWS=$(CURDIR)/_build/rows SPARSESURVEY_RUNS=$(CURDIR)/_build/runs $(BIN)/jupyter lab notebooks

# Needs Python, torch, triton and cupy alone: with PYTHON=… they are those of that interpreter, and nothing is installed.
gpu:
	$(PYTHON) -m sparsesurvey.campaign --minutes $(MINUTES) --device $(if $(filter cuda%,$(DEVICE)),$(DEVICE),cuda) \
		--record sparsesurvey/recorded

# These need transformers and tokenizers as well. CORPUS is a folder with the files of pretraining.FILES.
gpu-train:
	$(PYTHON) -m sparsesurvey.campaign --training --minutes $(MINUTES) --record sparsesurvey/recorded \
		--device $(if $(filter cuda%,$(DEVICE)),$(DEVICE),cuda) $(if $(CORPUS),--corpus $(CORPUS))

clean:
	rm -rf _build

distclean: clean
	rm -rf $(VENV) node_modules $(VENDOR)

# A GPU build of torch brings the triton that it was made with. With a CPU build one is installed that compiles our
# kernels ahead of time and interprets them: their tests need no GPU.
TRITON  := 3.6.0

# Nothing is installed again until the requirements change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/python -c "import triton" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "triton==$(TRITON)" || \
		echo "triton was not found: the tests that interpret and compile its kernels are skipped."
	touch $@

# The front-end files of widgets and formulas: pinned by package-lock.json, copied, never committed. The fonts go to two
# places because embed-amd.js looks in either, by a race. Without npm the pages use the public CDN and say so.
$(VENDOR)/.complete: package.json package-lock.json Makefile
	@if ! command -v npm >/dev/null; then \
		echo "npm was not found: the pages will load widgets and formulas from the public CDN, and say so."; \
	elif npm ci --ignore-scripts --no-audit --no-fund && $(MAKE) --no-print-directory vendor; then \
		touch $@; \
	else \
		rm -rf $(VENDOR); \
		echo "npm failed: the pages will load widgets and formulas from the public CDN, and say so."; \
	fi

# Choose the pinned versions anew. soupsieve 3 needs Python 3.11.5; Debian 12 has 3.11.2.
.PHONY: lock
lock:
	rm -rf _build/lock && $(PYTHON) -m venv _build/lock
	_build/lock/bin/python -m pip install --quiet "torch==2.13.0" "soupsieve<3" -e ".[book,test]"
	grep '^#' constraints.txt > _build/constraints.txt
	_build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' \
		| grep -v '^nvidia-\|^cuda-\|^triton' >> _build/constraints.txt
	mv _build/constraints.txt constraints.txt
	npm install --package-lock-only --ignore-scripts --no-audit --no-fund

.PHONY: vendor
vendor:
	rm -rf $(VENDOR)
	mkdir -p $(VENDOR)/@jupyter-widgets/html-manager/dist $(VENDOR)/katex/fonts
	cp node_modules/requirejs/require.js $(WIDGETS)/embed-amd.js $(VENDOR)/
	cp node_modules/anywidget/dist/index.js $(VENDOR)/anywidget.js
	cp $(WIDGETS)/*.woff2 $(VENDOR)/@jupyter-widgets/
	cp $(WIDGETS)/*.woff2 $(VENDOR)/@jupyter-widgets/html-manager/dist/
	cp node_modules/katex/dist/katex.min.js node_modules/katex/dist/katex.min.css $(VENDOR)/katex/
	cp node_modules/katex/dist/fonts/*.woff2 $(VENDOR)/katex/fonts/
