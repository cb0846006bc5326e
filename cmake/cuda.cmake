# cfpo_find_cuda(<compiler-variable> <reason-variable>)
#
# Sets the first to a CUDA compiler that can build for CFPO_KERNELS_CUDA_ARCHS, or to "" with the
# reason in the second; the module repeats that reason at run time, so that a CPU-only build never
# goes unnoticed. With CFPO_KERNELS_CUDA=ON a missing or broken compiler is an error instead.
function(cfpo_find_cuda compiler_variable reason_variable)
  set(${compiler_variable} "" PARENT_SCOPE)
  set(${reason_variable} "" PARENT_SCOPE)
  if(NOT CFPO_KERNELS_CUDA MATCHES "^(ON|OFF|AUTO)$")
    message(FATAL_ERROR "CFPO_KERNELS_CUDA must be ON, OFF or AUTO, not '${CFPO_KERNELS_CUDA}'")
  endif()
  if(CFPO_KERNELS_CUDA STREQUAL "OFF")
    set(${reason_variable} "switched off at build time (CFPO_KERNELS_CUDA=OFF)" PARENT_SCOPE)
    return()
  endif()

  cfpo_locate_nvcc(nvcc)
  if(NOT nvcc)
    set(reason "no CUDA compiler was found at build time")
    set(log "Put nvcc on PATH, or set CUDACXX to it, or CUDA_HOME to the folder above its bin.")
  else()
    cfpo_probe_nvcc("${nvcc}" works log)
    if(works)
      set(${compiler_variable} "${nvcc}" PARENT_SCOPE)
      return()
    endif()
    string(REPLACE ";" "," archs "${CFPO_KERNELS_CUDA_ARCHS}")
    set(reason "the CUDA compiler ${nvcc} does not work")
    string(APPEND reason " (at build time it failed on a test program for ${archs})")
    if(CMAKE_VERSION VERSION_LESS 4.0.2 AND log MATCHES "CMAKE_CUDA_ARCHITECTURES:")
      set(reason "CMake ${CMAKE_VERSION} does not know all of the CUDA architectures ${archs}")
      set(log "Architectures such as 100f need CMake 4.0.2 or newer.")
    endif()
  endif()

  string(REPLACE "\n" "\n  " log "  ${log}")  # message() keeps the lines of indented text
  if(CFPO_KERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CFPO_KERNELS_CUDA=ON, but ${reason}.\n${log}")
  endif()
  message(WARNING "Building the CPU kernels only: ${reason}.\n${log}")
  string(REPLACE "\\" "/" reason "${reason}")
  string(REPLACE "\"" "'" reason "${reason}")
  set(${reason_variable} "${reason}" PARENT_SCOPE)
endfunction()

# Not check_language(CUDA): it caches a NOTFOUND that survives the installation of nvcc.
function(cfpo_locate_nvcc result)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    find_program(nvcc NAMES "$ENV{CUDACXX}" NO_CACHE)
    if(NOT nvcc)
      set(nvcc "$ENV{CUDACXX}")  # the probe fails on it and the reason names it
    endif()
  else()
    find_program(nvcc NAMES nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
                 PATH_SUFFIXES bin NO_CACHE)
  endif()
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

# Builds a module for the wanted architectures in a project of its own, because enable_language()
# cannot fail softly. Only success is remembered.
function(cfpo_probe_nvcc nvcc works_variable log_variable)
  set(key "${nvcc}|${CFPO_KERNELS_CUDA_ARCHS}")
  if("${CFPO_CUDA_PROBE_PASSED}" STREQUAL "${key}")
    set(${works_variable} TRUE PARENT_SCOPE)
    return()
  endif()
  set(probe "${CMAKE_BINARY_DIR}/cuda_probe")
  file(REMOVE_RECURSE "${probe}")
  file(WRITE "${probe}/probe.cu" "__global__ void probe() {}\nvoid launch() { probe<<<1, 1>>>(); }\n")
  file(WRITE "${probe}/CMakeLists.txt" "
    cmake_minimum_required(VERSION 3.25)
    project(probe LANGUAGES CXX CUDA)
    add_library(probe MODULE probe.cu)
    target_compile_options(probe PRIVATE --compress-mode=size)
    set_target_properties(probe PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  ")
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -S "${probe}" -B "${probe}/build" -G "${CMAKE_GENERATOR}"
            "-DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}"
            "-DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}"
            "-DCMAKE_CUDA_COMPILER=${nvcc}"
            "-DCMAKE_CUDA_ARCHITECTURES=${CFPO_KERNELS_CUDA_ARCHS}"
    RESULT_VARIABLE status OUTPUT_VARIABLE log ERROR_VARIABLE log)
  if(status EQUAL 0)
    execute_process(COMMAND "${CMAKE_COMMAND}" --build "${probe}/build"
                    RESULT_VARIABLE status OUTPUT_VARIABLE log ERROR_VARIABLE log)
  endif()
  if(status EQUAL 0)
    set(CFPO_CUDA_PROBE_PASSED "${key}" CACHE INTERNAL "")
    set(${works_variable} TRUE PARENT_SCOPE)
  else()
    set(${works_variable} FALSE PARENT_SCOPE)
  endif()
  set(${log_variable} "${log}" PARENT_SCOPE)
endfunction()
