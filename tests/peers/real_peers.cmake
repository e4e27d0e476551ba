# SPDX-License-Identifier: Apache-2.0
# Tests beside the Python packages of requirements.txt. environment.py finds their Python, makes it where
# LOWRANK_INSTALL_PEERS=1 allows it, and otherwise says in a line why the test is skipped.
find_package(Python3 3.10 COMPONENTS Interpreter QUIET)
if(NOT Python3_Interpreter_FOUND)
  return()
endif()

function(lowrank_peer_test name)
  add_test(NAME peers_${name} COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/environment.py
                                      ${CMAKE_CURRENT_LIST_DIR}/${name}.py ${ARGN})
  # The first one may have to install the packages.
  set_tests_properties(peers_${name} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 2400 FIXTURES_REQUIRED peers
                       ENVIRONMENT LOWRANK_PEERS_RUN=${CMAKE_CURRENT_BINARY_DIR}/peers-run)
endfunction()

if(TARGET lowrank_program)
  lowrank_peer_test(peft_loads $<TARGET_FILE:lowrank_program>)
  lowrank_peer_test(peft_writes $<TARGET_FILE:lowrank_program>)
  lowrank_peer_test(peft_combine $<TARGET_FILE:lowrank_program>)
  lowrank_peer_test(bitsandbytes_files $<TARGET_FILE:lowrank_program>)
  lowrank_peer_test(gguf_files $<TARGET_FILE:lowrank_program>)
endif()
if(TARGET lowrank_io)
  add_executable(peer_quantise quantise.cpp)
  target_link_libraries(peer_quantise PRIVATE lowrank lowrank_io lowrank_flags)
  lowrank_peer_test(bitsandbytes_quantises $<TARGET_FILE:peer_quantise>)
  add_executable(peer_train train.cpp)
  target_link_libraries(peer_train PRIVATE lowrank lowrank_io lowrank_flags)
  if(TARGET lowrank_program)
    lowrank_peer_test(peft_trains $<TARGET_FILE:lowrank_program> $<TARGET_FILE:peer_train>)
  endif()
endif()

# Before all: forget what ran last time. After all: how many ran.
add_test(NAME peers_begin COMMAND ${CMAKE_COMMAND} -E rm -rf ${CMAKE_CURRENT_BINARY_DIR}/peers-run)
set_tests_properties(peers_begin PROPERTIES FIXTURES_SETUP peers)
add_test(NAME peers_count COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/count.py ${CMAKE_CURRENT_BINARY_DIR}/peers-run)
set_tests_properties(peers_count PROPERTIES FIXTURES_CLEANUP peers SKIP_RETURN_CODE 77)
