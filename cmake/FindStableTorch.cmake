# Target marlin_qqq_torch: what a library on torch's stable ABI needs of the torch installed in Python_EXECUTABLE. Its
# headers give inline code only, and of libtorch_cpu the stable C functions, which later versions keep. torch's own CMake
# package is not used: it asks for all of CUDA and for torch's compiler flags.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)
if(NOT MARLIN_QQQ_TORCH_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "torch >= 2.10 is not installed in ${Python_EXECUTABLE}: install it there, or name another "
                        "interpreter with -DPython_EXECUTABLE=")
  endif()
  set(MARLIN_QQQ_TORCH_DIR "${torch_dir}" CACHE PATH "Folder of the torch package to build against")
endif()
if(NOT EXISTS "${MARLIN_QQQ_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "${MARLIN_QQQ_TORCH_DIR} has no stable ABI headers: torch >= 2.10 is needed")
endif()

add_library(marlin_qqq_torch INTERFACE)
target_include_directories(marlin_qqq_torch SYSTEM INTERFACE "${MARLIN_QQQ_TORCH_DIR}/include")
# The stable ABI as of torch 2.10: the library runs on that version and every later one.
target_compile_definitions(marlin_qqq_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000 TORCH_STABLE_ONLY)
target_link_libraries(marlin_qqq_torch INTERFACE "${MARLIN_QQQ_TORCH_DIR}/lib/libtorch_cpu.so")
# libtorch_cpu's own dependencies are not ours to resolve.
target_link_options(marlin_qqq_torch INTERFACE -Wl,--allow-shlib-undefined)
