# The CUDA kernels: their own source run on the host (needs CUDA's headers, neither nvcc nor a GPU), and on a GPU.
find_package(CUDAToolkit QUIET)
find_path(VQ_CUDA_HEADERS cuda_fp16.h HINTS ${CUDAToolkit_INCLUDE_DIRS} PATHS ENV CUDA_PATH /usr/local/cuda
          PATH_SUFFIXES include DOC "folder of cuda_fp16.h, for the tests of the CUDA kernels on the host")
if(VQ_CUDA_HEADERS)
    foreach(subject kernels decode)
        set(program test_cuda_${subject})
        add_executable(${program} ${program}.cpp)
        target_link_libraries(${program} PRIVATE vq_cpu)
        target_include_directories(${program} SYSTEM PRIVATE ${VQ_CUDA_HEADERS})
        # As nvcc reads it: #pragma unroll is known, and 16 bytes of any type may be moved as one uint4. -O1, because some
        # sixty kernels in one file take a sanitizer build minutes otherwise.
        target_compile_options(${program} PRIVATE -Wno-unknown-pragmas -fno-strict-aliasing -O1)
        add_test(NAME cuda_${subject} COMMAND ${program})
    endforeach()
    target_sources(test_cuda_decode PRIVATE ${CMAKE_SOURCE_DIR}/kernels/buckets.cpp)
else()
    message(STATUS "cuda_fp16.h was not found: the CUDA kernels are not tested (set VQ_CUDA_HEADERS to its folder)")
endif()

if(VQ_HAS_CUDA)
    foreach(subject device decode_device)
        set(program test_cuda_${subject})
        add_executable(${program} ${program}.cpp)
        target_link_libraries(${program} PRIVATE vq_cuda vq_cpu)
        add_test(NAME cuda_${subject} COMMAND ${program})
        set_tests_properties(cuda_${subject} PROPERTIES SKIP_RETURN_CODE 77)
    endforeach()
endif()
