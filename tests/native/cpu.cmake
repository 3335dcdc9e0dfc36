add_executable(test_cpu_kernels test_cpu_kernels.cpp)
target_link_libraries(test_cpu_kernels PRIVATE vq_cpu Threads::Threads)
add_test(NAME cpu_kernels COMMAND test_cpu_kernels)
add_executable(test_cpu_decode test_cpu_decode.cpp)
target_link_libraries(test_cpu_decode PRIVATE vq_cpu Threads::Threads)
add_test(NAME cpu_decode COMMAND test_cpu_decode)
add_executable(test_cpu_fixed_point test_cpu_fixed_point.cpp)
target_link_libraries(test_cpu_fixed_point PRIVATE vq_cpu Threads::Threads)
add_test(NAME cpu_fixed_point COMMAND test_cpu_fixed_point)

# The ONNX Runtime adapter runs inside ONNX Runtime: its pytest files, on the library of this build. With sanitizers the
# interpreter needs their runtime first; leaks are not looked for, as the interpreter leaves plenty.
set(VQ_PYTHON "" CACHE FILEPATH "Python with onnxruntime and pytest, to test the ONNX Runtime library")
if(TARGET vq_ort AND VQ_PYTHON)
    add_test(NAME ort_op WORKING_DIRECTORY ${CMAKE_CURRENT_LIST_DIR}/../.. COMMAND
             ${VQ_PYTHON} -m pytest -q -p no:cacheprovider tests/plugins/test_ort_op.py tests/plugins/test_ort_decode.py
             --native-libraries $<TARGET_FILE_DIR:vq_ort>)
    if(VQ_SANITIZE)
        execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=libasan.so OUTPUT_VARIABLE asan
                        OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
        execute_process(COMMAND ${CMAKE_CXX_COMPILER} -print-file-name=libstdc++.so OUTPUT_VARIABLE stdcxx
                        OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
        set_tests_properties(ort_op PROPERTIES ENVIRONMENT
                             "LD_PRELOAD=${asan} ${stdcxx};ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0")
    endif()
endif()
