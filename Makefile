# make run   the whole pipeline on a generated sample, here, with nothing set up beforehand
#            make run DATA=folder [RECIPE=name] [TOKENIZER=folder] [INSTRUCTIONS=file] [SET="key=value ..."]
# make test  everything CI runs
# make up / make down   Airflow with its UI, left running / ended
# make deployment       the compose file in a real Docker engine: minutes, as root
# For GNU make 3.81 too, which macOS has: each line of a recipe is a shell of its own.
SHELL := /bin/bash
.PHONY: run up down test lint pictures faults deployment install install-dev

local = . include/scripts/tools.sh && PYTHONPATH=include exec .env/airflow/bin/python include/scripts/local_stack.py

run: install
	@[ '$(RECIPE)' != smollm2 ] || include/scripts/install_smollm2.sh || exit
	@$(local) run --data '$(DATA)' --recipe '$(RECIPE)' --tokenizer '$(TOKENIZER)' --instructions '$(INSTRUCTIONS)' $(foreach pair,$(SET),--set '$(pair)')

up: install
	@$(local) up

down: install
	@$(local) down

install:
	@include/scripts/install.sh

install-dev:
	@include/scripts/install.sh dev

lint: install-dev
	.env/airflow/bin/ruff check . && .env/airflow/bin/ruff format --check . && .env/airflow/bin/mypy

test: lint
	. include/scripts/tools.sh && include/scripts/test.sh

pictures: install-dev
	.env/airflow/bin/python -m pytest tests/browser/test_accessibility.py -k "light and (going or finished or new)" --pictures docs/pictures --basetemp=/tmp/fast_cpt-pictures

faults: install-dev
	. include/scripts/tools.sh && .env/airflow/bin/python -m pytest tests/faults tests/e2e/test_{names,marks,turns,rented_run,year}.py tests/plugins/test_mlflow.py --durations=0

deployment: install-dev
	. include/scripts/tools.sh && .env/airflow/bin/python -m pytest -s tests/deployment
