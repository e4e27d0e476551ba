# cmake -DROOT=... -DKIND=find_package|bare|blas|fetch_content|add_subdirectory|plain -DWORK=... -P consume.cmake
# cmake -DROOT=... -DKIND=strict_NAME -DCOMPILER=... -DSOURCE=file -DFLAGS=-O2 -DWORK=... -P consume.cmake
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

if(KIND MATCHES "^strict")  # under a stranger's warnings, with none of our flags
  separate_arguments(FLAGS)
  run(${COMPILER} -std=c++20 -Wall -Wextra -Werror ${FLAGS} -I${ROOT}/include ${SOURCE} -o ${dir}/strict)
  run(${dir}/strict)
  message("${output}")
  return()
endif()

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
set(project ${KIND})
if(KIND STREQUAL "bare")  # a machine that has a compiler and nothing else: neither Eigen nor any other library
  set(project find_package)
  set(options -DLOWRANK_WITH_OPENMP=OFF)
  foreach(package Eigen3 nlohmann_json xtensor Torch)
    list(APPEND options -DCMAKE_DISABLE_FIND_PACKAGE_${package}=ON)
  endforeach()
  # FindMPI itself is to look and not to find: a compiler that compiles nothing.
  find_program(TRUE_PROGRAM true REQUIRED)
  list(APPEND options -DMPI_CXX_COMPILER=${TRUE_PROGRAM})
  set(user_options ${options} -DCMAKE_EXPORT_COMPILE_COMMANDS=ON)
elseif(KIND STREQUAL "find_package")
  set(user_options "-DEXPECTED_PARTS=${PARTS}")
endif()
if(KIND MATCHES "^(find_package|bare|blas)$")
  run(${configure} -S ${ROOT} -B ${dir}/library -DLOWRANK_BUILD_TESTS=OFF -DLOWRANK_BUILD_EXAMPLES=OFF ${options})
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
run(${configure} -S ${ROOT}/tests/consumers/${project} -B ${dir}/build -DLOWRANK_ROOT=${ROOT}
    -DCMAKE_PREFIX_PATH=${dir}/moved ${user_options})
run(${CMAKE_COMMAND} --build ${dir}/build)
if(KIND STREQUAL "bare")
  file(READ ${dir}/build/compile_commands.json commands)
  string(REPLACE "${dir}" "" commands "${commands}")
  string(REPLACE "${ROOT}" "" commands "${commands}")
  string(REPLACE "-isystem /moved/include" "" commands "${commands}")
  if(commands MATCHES "([Ee]igen|-DWITH_|-isystem)" OR NOT commands MATCHES "parts\\.cpp")
    message(FATAL_ERROR "${CMAKE_MATCH_1}: the library is to stand on its own include path here:\n${commands}")
  endif()
endif()
run(${dir}/build/consumer)
message("${output}")
if(EXISTS ${dir}/build/consumer_parts)
  run(${dir}/build/consumer_parts)
endif()
