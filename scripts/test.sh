#!/usr/bin/env bash
# Everything that must be green: install, lint, types, native libraries and their tests, tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh cpu,plugins,dev

# The report is opened in a real browser; without one those tests say so and skip.
if ! command -v chromium google-chrome chromium-browser >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing Chromium for the browser tests ..."
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 \
            || echo "Chromium could not be installed; the browser tests will skip"
    else
        echo "no Chromium found; the browser tests will skip"
    fi
fi

# Jetson's compiler and an emulator for its code; without them scripts/test_native.sh says what it leaves out.
if ! command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 || ! command -v qemu-aarch64-static >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing a compiler and an emulator for 64-bit Arm ..."
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            g++-aarch64-linux-gnu qemu-user-static) >/dev/null 2>&1 || echo "they could not be installed"
    fi
fi

run=.venv/bin
$run/ruff check .
$run/ruff format --check .
$run/mypy -p export_vq
scripts/test_native.sh
$run/pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
