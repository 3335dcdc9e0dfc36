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

compiled() {
    local folder=build/native-$1
    shift
    mkdir -p "$folder"
    {
        cmake -S plugins -B "$folder" "${options[@]}" "$@" && cmake --build "$folder"
    } >"$folder/log.txt" 2>&1 || {
        tail -n 40 "$folder/log.txt"
        exit 1
    }
}

native_tests() {
    local folder=build/native-$1
    echo "native tests in $folder ..."
    compiled "$@"
    ctest --test-dir "$folder" --output-on-failure --no-tests=error --timeout 300 -j 2
}

native_tests plain -DVQ_SANITIZE=OFF
# -O1 keeps stacks readable; the CUDA runtime maps memory where AddressSanitizer wants a gap.
export ASAN_OPTIONS=protect_shadow_gap=0 UBSAN_OPTIONS=print_stacktrace=1
native_tests sanitized -DVQ_SANITIZE=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1

# 64-bit Arm, for Jetson: everything is compiled, the CPU kernels run in an emulator. CUDA's libraries for Arm are not here,
# so what needs them is not linked.
arm_tests() {
    local emulator=()
    if command -v qemu-aarch64-static >/dev/null 2>&1; then
        emulator=("-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static;-L;/usr/aarch64-linux-gnu")
    fi
    echo "native tests in build/native-aarch64 ..."
    compiled aarch64 "-DCMAKE_TOOLCHAIN_FILE=$PWD/plugins/cmake/aarch64-linux-gnu.cmake" -DVQ_CUDA=OFF -DVQ_PYTHON= \
        "-DVQ_HOST_OBJECTS=$(command -v nvcc >/dev/null 2>&1 && echo ON || echo OFF)" "${emulator[@]}"
    if [ ${#emulator[@]} = 0 ]; then
        echo "no qemu-aarch64-static found; the Arm kernels are compiled and not run"
        return
    fi
    ctest --test-dir build/native-aarch64 --output-on-failure --no-tests=error --timeout 900 -j 2 -R '^cpu_'
}

if command -v aarch64-linux-gnu-g++ >/dev/null 2>&1; then
    arm_tests
else
    echo "no aarch64-linux-gnu-g++ found; nothing is compiled for Arm"
fi
