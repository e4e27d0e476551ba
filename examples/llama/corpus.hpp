// SPDX-License-Identifier: Apache-2.0
// Text from files and folders as byte tokens, divided into what is trained on, what rates are chosen by, and what is
// reported.
#pragma once

#include <filesystem>
#include <string>

#include "tensors.hpp"

namespace llama {

struct CorpusOptions {
  double held_out = 0.06;  ///< share of the text that goes to each of validation and test
  Index window = 128;      ///< tokens a training example reads; every part must hold one and the token after it
  std::uint64_t seed = 0;  ///< decides which files are held out
};

/// Where the text came from, for the reader of the report.
struct CorpusReport {
  std::size_t files = 0, empty = 0, binary = 0, unreadable = 0, links = 0;
  std::size_t bytes = 0;       ///< read
  std::size_t duplicates = 0;  ///< bytes of repeated paragraphs left out
  bool whole_files = false;    ///< held out by file; otherwise the end of each file
};

struct Corpus {
  std::vector<Token> train, validation, test;
  CorpusReport report;
};

/// Reads every file named, and every file under every folder named.
///
/// Folders are walked in sorted order; hidden files, binary files, empty files and second names of a file already read
/// are passed over and counted. A file named directly must be text. Paragraphs of 100 bytes or more that occurred
/// before are left out: a licence at the top of every file would otherwise be in the held-out text and in the training
/// text. With 20 files or more, whole files are held out; with fewer, the end of each. Token = byte. Throws
/// lowrank::IoError naming the path (missing, unreadable, empty, binary, not a file); lowrank::ArgumentError when the
/// text is too short for a window in each part.
Corpus load_text(const std::vector<std::string>& paths, const CorpusOptions& options);

/// Token ids from .npy (any integer type) or raw little-endian integers of `bits` 16 or 32; the end of each file is
/// held out. Throws as load_text, and lowrank::IoError for an id outside [0, vocabulary).
Corpus load_tokens(const std::vector<std::string>& paths, const CorpusOptions& options, int bits, Index vocabulary);

/// `count` windows for training step `step`, at places that depend on (seed, step) alone.
Batch random_batch(const std::vector<Token>& tokens, Index count, Index window, std::uint64_t seed, std::uint64_t step);

/// At most `count` windows spread evenly over the tokens, without overlap.
std::vector<Batch> even_batches(const std::vector<Token>& tokens, Index count, Index window, Index windows_a_batch);

/// Offset of the first byte that no text has, or npos: a zero byte, or, where more than one byte in twenty is a control
/// character, the first of those.
std::size_t first_binary_byte(std::string_view text);
}  // namespace llama
