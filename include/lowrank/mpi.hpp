// SPDX-License-Identifier: Apache-2.0
// The MPI front end: the only header that names MPI. A world that starts and ends itself, and gathers what ranks found.
#pragma once

#include <mpi.h>

#include <climits>
#include <string>
#include <vector>

#include "lowrank/core/errors.hpp"

namespace lowrank {

/// MPI for the life of this object: initialises it unless somebody has, and finalises what it initialised.
///
/// The world that initialised MPI must be the last to go; others may come and go while it lives. Not copyable.
/// **Throws** Error when MPI cannot start. An MPI call that fails later ends the program, as MPI's default handler
/// does.
class MpiWorld {
 public:
  MpiWorld() {
    int running = 0;
    MPI_Initialized(&running);
    if (running == 0) {
      if (MPI_Init(nullptr, nullptr) != MPI_SUCCESS) throw Error("MpiWorld: MPI_Init failed");
      owns_ = true;
    }
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size_);
  }
  MpiWorld(const MpiWorld&) = delete;
  MpiWorld& operator=(const MpiWorld&) = delete;
  ~MpiWorld() {
    int done = 0;
    MPI_Finalized(&done);
    if (owns_ && done == 0) MPI_Finalize();
  }

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return size_; }

  /// Everybody's text on rank 0, in the order of ranks; nothing elsewhere. Collective: every rank must call it.
  /// **Cost** one reduction, and the bytes once over the network. **Throws** ArgumentError on every rank when a text
  /// exceeds MPI's count of 2³¹ − 1 bytes.
  [[nodiscard]] std::vector<std::string> gather(const std::string& mine) const {
    unsigned long long length = mine.size(), longest = 0;
    MPI_Allreduce(&length, &longest, 1, MPI_UNSIGNED_LONG_LONG, MPI_MAX, MPI_COMM_WORLD);
    if (longest > INT_MAX)
      throw ArgumentError(detail::text("MpiWorld::gather: a text of ", longest, " bytes is too long"));
    std::vector<std::string> all;
    if (rank_ != 0) {
      MPI_Send(mine.data(), int(length), MPI_CHAR, 0, tag, MPI_COMM_WORLD);
      return all;
    }
    all.push_back(mine);
    for (int r = 1; r < size_; ++r) {
      MPI_Status status;
      int count = 0;
      MPI_Probe(r, tag, MPI_COMM_WORLD, &status);
      MPI_Get_count(&status, MPI_CHAR, &count);
      std::string text(std::size_t(count), '\0');
      MPI_Recv(text.data(), count, MPI_CHAR, r, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      all.push_back(std::move(text));
    }
    return all;
  }

 private:
  static constexpr int tag = 4711;
  int rank_ = 0, size_ = 1;
  bool owns_ = false;
};

}  // namespace lowrank
