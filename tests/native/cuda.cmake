# The CUDA kernels: their own source run on the host (needs CUDA's headers, neither nvcc nor a GPU), and on a GPU.
find_package(CUDAToolkit QUIET)
find_path(VQ_CUDA_HEADERS cuda_fp16.h HINTS ${CUDAToolkit_INCLUDE_DIRS} PATHS ENV CUDA_PATH /usr/local/cuda
          PATH_SUFFIXES include DOC "folder of cuda_fp16.h, for the tests of the CUDA kernels on the host")
if(VQ_CUDA_HEADERS)
    add_executable(test_cuda_kernels test_cuda_kernels.cpp)
    target_link_libraries(test_cuda_kernels PRIVATE vq_cpu)
    target_include_directories(test_cuda_kernels SYSTEM PRIVATE ${VQ_CUDA_HEADERS})
    # As nvcc reads it: #pragma unroll is known, and 16 bytes of any type may be moved as one uint4. -O1, because some
    # sixty kernels in one file take a sanitizer build minutes otherwise.
    target_compile_options(test_cuda_kernels PRIVATE -Wno-unknown-pragmas -fno-strict-aliasing -O1)
    add_test(NAME cuda_kernels COMMAND test_cuda_kernels)
else()
    message(STATUS "cuda_fp16.h was not found: the CUDA kernels are not tested (set VQ_CUDA_HEADERS to its folder)")
endif()

if(VQ_HAS_CUDA)
    add_executable(test_cuda_device test_cuda_device.cpp)
    target_link_libraries(test_cuda_device PRIVATE vq_cuda vq_cpu)
    add_test(NAME cuda_device COMMAND test_cuda_device)
    set_tests_properties(cuda_device PROPERTIES SKIP_RETURN_CODE 77)
endif()
