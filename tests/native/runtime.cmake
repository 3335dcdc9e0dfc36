# The programs of plugins/runtime: both compiled, the one over ONNX Runtime run on a bundle by its pytest file.
add_subdirectory(${CMAKE_SOURCE_DIR}/runtime runtime)
foreach(program vq_run_ort vq_run_trt)
    if(TARGET ${program})
        target_compile_options(${program} PRIVATE -Werror)
    endif()
endforeach()
if(TARGET vq_run_ort AND TARGET vq_ort AND VQ_PYTHON)
    add_test(NAME run_ort WORKING_DIRECTORY ${CMAKE_CURRENT_LIST_DIR}/../.. COMMAND
             ${VQ_PYTHON} -m pytest -q -p no:cacheprovider tests/plugins/test_runtime.py
             --native-libraries $<TARGET_FILE_DIR:vq_ort> --runtime-programs $<TARGET_FILE_DIR:vq_run_ort>)
endif()
