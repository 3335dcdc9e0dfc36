// What a library was built from. library.py searches the file for these bytes, so that nothing is loaded to learn it.
extern "C" __attribute__((visibility("default"))) const char* vq_build_info() {
    return "{\"vq_build_info\": 1, \"source_hash\": \"" VQ_SOURCE_HASH
           "\", \"cuda\": "
#ifdef VQ_HAS_CUDA
           "true"
#else
           "false"
#endif
           "}";
}
