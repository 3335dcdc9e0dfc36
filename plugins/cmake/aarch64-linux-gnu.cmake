# Cross-compile for Jetson and other 64-bit Arm Linux: -DCMAKE_TOOLCHAIN_FILE=plugins/cmake/aarch64-linux-gnu.cmake
# CUDA code needs the toolkit's cross packages too (cuda-cross-aarch64); without them give -DVQ_CUDA=OFF.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
