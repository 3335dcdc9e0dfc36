#!/usr/bin/env bash
# The native part of scripts/test.sh: format, the libraries that the Python tests use, and the C++ tests, as they ship and
# under AddressSanitizer and UndefinedBehaviorSanitizer. One GPU architecture, to keep it short; none where nvcc is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
architecture=80

find plugins tests/native -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
    | xargs -0 clang-format --dry-run -Werror

export-vq plugins build --cuda-architectures $architecture

headers=$(scripts/fetch_headers.sh)
mapfile -t options <<<"$headers"
options+=(-G Ninja -DVQ_TESTS=ON "-DVQ_CUDA_ARCHITECTURES=$architecture" "-DVQ_PYTHON=$PWD/.venv/bin/python")

native_tests() {
    local folder=build/native-$1
    shift
    echo "native tests in $folder ..."
    mkdir -p "$folder"
    {
        cmake -S plugins -B "$folder" "${options[@]}" "$@" && cmake --build "$folder"
    } >"$folder/log.txt" 2>&1 || {
        tail -n 40 "$folder/log.txt"
        exit 1
    }
    ctest --test-dir "$folder" --output-on-failure --no-tests=error --timeout 300
}

native_tests plain -DVQ_SANITIZE=OFF
# -O1 keeps stacks readable; the CUDA runtime maps memory where AddressSanitizer wants a gap.
export ASAN_OPTIONS=protect_shadow_gap=0 UBSAN_OPTIONS=print_stacktrace=1
native_tests sanitized -DVQ_SANITIZE=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1
