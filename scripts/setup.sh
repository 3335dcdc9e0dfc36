#!/usr/bin/env bash
# Makes .venv and installs the project with the given extras: scripts/setup.sh cpu,dev
# Does nothing when nothing that matters has changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:?usage: scripts/setup.sh EXTRA[,EXTRA...]}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "Python 3.10 or newer is needed, $("$python" --version) was found; name another with PYTHON=..." >&2
    exit 2
}

# The strict editable install links file by file, in build/: a new file counts as a change, and without build/ it is gone.
stamp=$( { "$python" --version; pwd; cat pyproject.toml constraints.txt; find exporter calibration plugins -name '*.py' -o -name '*.j2' | sort; } | sha256sum)
file=.venv/.installed-$extras
if [ "$(cat "$file" 2>/dev/null)" = "$stamp" ] && .venv/bin/python -c 'import export_vq' 2>/dev/null; then
    exit 0
fi
echo "installing into .venv (a few minutes the first time) ..."
[ -x .venv/bin/python ] || "$python" -m venv .venv
rm -rf build
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
    --config-settings editable_mode=strict -e ".[$extras]"
echo "$stamp" > "$file"
