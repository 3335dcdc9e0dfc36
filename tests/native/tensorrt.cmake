# The TensorRT plugin, driven through its whole life without TensorRT's library. Each program loads libvq_trt.so itself.
if(TARGET vq_trt)
    foreach(subject plugin fields tensors logging enqueue decode)
        set(program test_tensorrt_${subject})
        add_executable(${program} ${program}.cpp)
        target_include_directories(${program} SYSTEM PRIVATE ${TENSORRT_INCLUDE_DIR})
        # The CUDA runtime for the test's own memory and streams; the plugin brings its own copy, as in an application.
        target_link_libraries(${program} PRIVATE vq_cpu CUDA::cudart_static Threads::Threads ${CMAKE_DL_LIBS})
        add_test(NAME tensorrt_${subject} COMMAND ${program} $<TARGET_FILE:vq_trt>)
    endforeach()
    target_sources(test_tensorrt_logging PRIVATE tensorrt_loggers.cpp)
    # Without a GPU it prints why and is shown as skipped.
    set_tests_properties(tensorrt_enqueue PROPERTIES SKIP_RETURN_CODE 77 LABELS gpu)
endif()
