# libmarlin_qqq_cuda. Every .cu of csrc/cuda is compiled for the architectures of MARLIN_QQQ_CUDA_ARCHITECTURES, but those
# in csrc/cuda/sm90 for sm_90a alone, always. What ptxas says of registers and spills is kept for scripts/check_ptxas.py.
set(MARLIN_QQQ_HAVE_CUDA OFF)
if(MARLIN_QQQ_CUDA STREQUAL "OFF")
  message(STATUS "CUDA: not built (MARLIN_QQQ_CUDA=OFF); this is a CPU package")
  return()
endif()
include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
  set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc CACHE FILEPATH "CUDA compiler")
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(MARLIN_QQQ_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CUDA: MARLIN_QQQ_CUDA=ON, but no nvcc was found; set CUDACXX or add it to PATH")
  endif()
  message(STATUS "CUDA: no nvcc found; this is a CPU package")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # ours are set by source below
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)  # the first that knows sm_120
  if(MARLIN_QQQ_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CUDA: nvcc 12.8 or newer is needed, ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.8; this is a CPU package")
  return()
endif()
find_package(CUDAToolkit REQUIRED)
message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${MARLIN_QQQ_CUDA_ARCHITECTURES}")

set(gencodes "")
set(newest 0)
foreach(architecture IN LISTS MARLIN_QQQ_CUDA_ARCHITECTURES)
  list(APPEND gencodes "-gencode=arch=compute_${architecture},code=sm_${architecture}")
  if(architecture MATCHES "^[0-9]+$" AND architecture GREATER newest)
    set(newest ${architecture})
  endif()
endforeach()
# PTX of the newest, for GPUs that come after it; that of an "a" architecture would run nowhere else.
if(newest GREATER 0)
  list(APPEND gencodes "-gencode=arch=compute_${newest},code=compute_${newest}")
endif()
# PTX of 90, always. sm_100 and 103 lie between 90 and 120: they can run neither's machine code, and of the two PTX only
# the older. And from 90 on, kernels are launched dependent, which those of older code would not wait for.
if(NOT newest EQUAL 90)
  list(APPEND gencodes "-gencode=arch=compute_90,code=compute_90")
endif()

file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
file(GLOB_RECURSE sm90_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/sm90/*.cu")
list(REMOVE_ITEM cuda_sources ${sm90_sources})
file(GLOB_RECURSE cuda_host_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cpp")
if(NOT cuda_sources)
  message(STATUS "CUDA: csrc/cuda has no sources; this is a CPU package")
  return()
endif()

add_library(marlin_qqq_cuda SHARED csrc/torch/cuda_ops.cpp ${cuda_host_sources} ${MARLIN_QQQ_PLAN_SOURCES})
set(cuda_flags -Xptxas=-v,-warn-spills,-warn-lmem-usage -Xcompiler=-Wall --expt-relaxed-constexpr)

function(marlin_qqq_add_cuda_objects name)
  # One object library a set of architectures: CMake keeps compile options a target, not a source, in order.
  cmake_parse_arguments(ARG "" "" "SOURCES;GENCODES" ${ARGN})
  add_library(${name} OBJECT ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags};${ARG_GENCODES}>)
  # ptxas speaks only while it compiles: keep what it said beside the object, for scripts/check_ptxas.py.
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES OFF
    CUDA_VISIBILITY_PRESET hidden
    RULE_LAUNCH_COMPILE "\"${Python_EXECUTABLE}\" \"${CMAKE_CURRENT_SOURCE_DIR}/scripts/keep_compiler_output.py\" <OBJECT>")
  target_sources(marlin_qqq_cuda PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

marlin_qqq_add_cuda_objects(marlin_qqq_cuda_common SOURCES ${cuda_sources} GENCODES ${gencodes})
if(sm90_sources)
  marlin_qqq_add_cuda_objects(marlin_qqq_cuda_sm90 SOURCES ${sm90_sources}
                              GENCODES "-gencode=arch=compute_90a,code=sm_90a")
endif()

target_link_libraries(marlin_qqq_cuda PRIVATE marlin_qqq_checks marlin_qqq_options CUDA::cudart_static ${CMAKE_DL_LIBS})
target_link_options(marlin_qqq_cuda PRIVATE -Wl,--as-needed -Wl,-z,defs -Wl,--exclude-libs,ALL)
set_target_properties(marlin_qqq_cuda PROPERTIES
  LIBRARY_OUTPUT_DIRECTORY "${MARLIN_QQQ_OUTPUT_DIR}" CUDA_ARCHITECTURES OFF LINKER_LANGUAGE CXX)
set(MARLIN_QQQ_HAVE_CUDA ON)
