# The pybind11 module marlin_qqq._introspection. The package works without it, but for plan(), tile_table() and
# build_info(), so a missing Python.h or pybind11 is a notice, not an error.
if(NOT Python_Development.Module_FOUND)
  message(STATUS "Introspection: Python.h not found (python3-dev); marlin_qqq.plan() will not be available")
  return()
endif()
execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
                OUTPUT_VARIABLE pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
if(NOT failed)
  list(APPEND CMAKE_PREFIX_PATH "${pybind11_dir}")
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG QUIET)
if(NOT pybind11_FOUND)
  message(STATUS "Introspection: pybind11 not found; marlin_qqq.plan() will not be available")
  return()
endif()
if(NOT MARLIN_QQQ_PLAN_SOURCES)
  message(STATUS "Introspection: csrc/plan has no sources yet; marlin_qqq.plan() will not be available")
  return()
endif()

pybind11_add_module(marlin_qqq_introspection csrc/pybind/introspection.cpp)
target_link_libraries(marlin_qqq_introspection PRIVATE marlin_qqq_core)
set(cuda_compiler "")
set(cuda_architectures "")
if(MARLIN_QQQ_HAVE_CUDA)
  set(cuda_compiler "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  list(JOIN MARLIN_QQQ_CUDA_ARCHITECTURES "," cuda_architectures)
  string(APPEND cuda_architectures ",90a")
endif()
target_compile_definitions(marlin_qqq_introspection PRIVATE
  MARLIN_QQQ_VERSION="${PROJECT_VERSION}"
  MARLIN_QQQ_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
  MARLIN_QQQ_CUDA_COMPILER="${cuda_compiler}"
  MARLIN_QQQ_CUDA_ARCHITECTURES="${cuda_architectures}")
set_target_properties(marlin_qqq_introspection PROPERTIES
  OUTPUT_NAME _introspection LIBRARY_OUTPUT_DIRECTORY "${MARLIN_QQQ_OUTPUT_DIR}")
