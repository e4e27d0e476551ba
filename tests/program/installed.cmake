# cmake -DBUILD=... -DPREFIX=... -DVERSION=... -P installed.cmake: installs the program of a build and runs it from there.
cmake_minimum_required(VERSION 3.20)
file(REMOVE_RECURSE ${PREFIX})
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${PREFIX} --component program COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${PREFIX}/bin/lowrank --version OUTPUT_VARIABLE said COMMAND_ERROR_IS_FATAL ANY)
if(NOT said STREQUAL "lowrank ${VERSION}\n")
  message(FATAL_ERROR "the installed program says '${said}', expected 'lowrank ${VERSION}'")
endif()
