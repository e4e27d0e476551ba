# cmake -DROOT=... -DKIND=find_package|blas|compiled|fetch_content|add_subdirectory|plain -DWORK=... -P consume.cmake
cmake_minimum_required(VERSION 3.20)
set(dir ${WORK}/${KIND})
file(REMOVE_RECURSE ${dir})
file(MAKE_DIRECTORY ${dir})

function(run)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${dir} RESULT_VARIABLE status OUTPUT_VARIABLE output
                  ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}\nfailed (${status}):\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

set(configure ${CMAKE_COMMAND} -G ${GENERATOR} -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_CXX_COMPILER=${COMPILER}
              -DCMAKE_BUILD_TYPE=Debug)  # the optimised build is what every other test does
if(KIND STREQUAL "plain")
  # No CMake, no Eigen, no OpenMP, no optimisation: the include path is all there is to it.
  run(${COMPILER} -std=c++20 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Werror
      -I${ROOT}/include ${ROOT}/tests/consumers/main.cpp ${ROOT}/tests/consumers/other.cpp -o ${dir}/plain)
  run(${dir}/plain)
  message("${output}")
  return()
endif()

if(KIND STREQUAL "blas")  # what is handed to BLAS and LAPACK, through an installed package that was told to
  set(options -DLOWRANK_WITH_BLAS=ON -DLOWRANK_WITH_LAPACK=ON)
  # The package must say where cblas.h lies: its copy here is nowhere a compiler looks by itself.
  file(COPY ${CBLAS} DESTINATION ${dir}/include)
  set(user_options -DLOWRANK_CBLAS_INCLUDE=${dir}/include -DCMAKE_CXX_FLAGS_DEBUG=-O1)
endif()
if(KIND STREQUAL "compiled")
  set(options -DLOWRANK_BUILD_COMPILED=ON)
endif()
if(KIND MATCHES "^(find_package|blas|compiled)$")
  run(${configure} -S ${ROOT} -B ${dir}/library -DLOWRANK_BUILD_TESTS=OFF -DLOWRANK_BUILD_EXAMPLES=OFF ${options})
  if(KIND STREQUAL "compiled")
    run(${CMAKE_COMMAND} --build ${dir}/library)
  endif()
  run(${CMAKE_COMMAND} --install ${dir}/library --prefix ${dir}/first)
  # Nothing installed may point back: neither to the tree nor to where it was installed first.
  file(GLOB_RECURSE installed ${dir}/first/*.cmake)
  foreach(file IN LISTS installed)
    file(READ ${file} text)
    foreach(path ${ROOT}/ ${dir}/)
      string(FIND "${text}" "${path}" at)
      if(NOT at EQUAL -1)
        message(FATAL_ERROR "${file} mentions ${path}")
      endif()
    endforeach()
  endforeach()
  file(RENAME ${dir}/first ${dir}/moved)
endif()
run(${configure} -S ${ROOT}/tests/consumers/${KIND} -B ${dir}/build -DLOWRANK_ROOT=${ROOT}
    -DCMAKE_PREFIX_PATH=${dir}/moved ${user_options})
run(${CMAKE_COMMAND} --build ${dir}/build)
run(${dir}/build/consumer)
message("${output}")
if(EXISTS ${dir}/build/consumer_parts)
  run(${dir}/build/consumer_parts)
endif()
if(KIND STREQUAL "compiled")
  set(compiled "${output}")
  run(${dir}/build/header_only)
  if(NOT output STREQUAL compiled)
    message(FATAL_ERROR "lowrank::compiled gives other bits than the headers: ${compiled} and ${output}")
  endif()
  # The library was compiled for the least this machine has; a program for more must be told so by the linker.
  if(CMAKE_HOST_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    execute_process(COMMAND ${CMAKE_COMMAND} --build ${dir}/build --target mismatched RESULT_VARIABLE status
                    OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(status EQUAL 0 OR NOT output MATCHES "lowrank_compiled_for_avx2_fma")
      message(FATAL_ERROR "a program for AVX2 over a library without must not link, and say which was missing:\n${output}")
    endif()
  endif()
endif()
