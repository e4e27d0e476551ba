// SPDX-License-Identifier: Apache-2.0
#include "corpus.hpp"

#include <algorithm>
#include <fstream>
#include <numeric>
#include <set>
#include <unordered_set>

#include "config.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/io/file.hpp"
#include "lowrank/io/npy.hpp"

namespace llama {
namespace fs = std::filesystem;
using lowrank::ArgumentError, lowrank::IoError;

std::size_t first_binary_byte(std::string_view text) {
  if (const std::size_t zero = text.find('\0'); zero != std::string_view::npos) return zero;
  const auto is_control = [](char c) {
    const auto u = static_cast<unsigned char>(c);
    return (u < 32 && !(u >= 8 && u <= 13) && u != 27) ||
           u == 127;  // backspace, tab … carriage return, escape do occur
  };
  const auto controls = std::count_if(text.begin(), text.end(), is_control);
  if (std::size_t(controls) * 20 <= text.size()) return std::string_view::npos;
  return std::size_t(std::find_if(text.begin(), text.end(), is_control) - text.begin());
}

namespace {

/// Text without the paragraphs of 100 bytes or more that `seen` knows. Lines without a letter or digit end a paragraph,
/// so that the constant part of a licence is one even where its neighbour names an author.
std::string without_repeats(const std::string& text, std::unordered_set<std::uint64_t>& seen) {
  std::string out, paragraph;
  bool dropped = false;
  const auto flush = [&] {
    if (paragraph.empty()) return;
    dropped = paragraph.size() >= 100 && !seen.insert(hash_bytes(paragraph)).second;
    if (!dropped) out += paragraph;
    paragraph.clear();
  };
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size() - 1) + 1;
    const std::string_view line(text.data() + begin, end - begin);
    begin = end;
    const bool has_word = std::any_of(line.begin(), line.end(), [](char c) {
      const auto u = static_cast<unsigned char>(c);
      return std::isalnum(u) || u >= 128;
    });
    if (has_word) {
      paragraph += line;
    } else {
      flush();
      if (!dropped) out += line;
    }
  }
  flush();
  return out;
}

/// The files a list of paths means, in a fixed order, each once.
struct FileList {
  std::vector<std::string> files;
  std::set<std::string> named;  // those the user named one by one
};

FileList list_files(const std::vector<std::string>& paths, CorpusReport& report) {
  FileList list;
  std::set<fs::path> known;
  const auto add = [&](const fs::path& path) {
    if (known.insert(fs::weakly_canonical(path)).second)
      list.files.push_back(path.string());
    else
      ++report.links;
  };
  for (const std::string& path : paths) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (error) throw IoError(path, "cannot be read: " + error.message());
    if (fs::is_regular_file(status)) {
      list.named.insert(path);
      add(path);
    } else if (fs::is_directory(status)) {
      std::vector<fs::path> found;
      fs::recursive_directory_iterator walk(path, error), end;
      if (error) throw IoError(path, "cannot be listed: " + error.message());
      while (walk != end) {
        const bool hidden = walk->path().filename().string().starts_with(".");
        std::error_code ignored;
        if (hidden && walk->is_directory(ignored)) walk.disable_recursion_pending();
        if (!hidden && walk->is_regular_file(ignored)) found.push_back(walk->path());
        walk.increment(error);
        if (error) throw IoError(path, "cannot be listed: " + error.message());
      }
      // Real files before links to them, so that the name that stays is the file's own.
      std::sort(found.begin(), found.end(), [](const fs::path& a, const fs::path& b) {
        const bool la = fs::is_symlink(a), lb = fs::is_symlink(b);
        return la != lb ? lb : a < b;
      });
      for (const fs::path& file : found) add(file);
    } else {
      throw IoError(path, "is neither a file nor a folder");
    }
  }
  return list;
}

void append(std::vector<Token>& to, std::string_view text) {
  for (const char c : text) to.push_back(Token(static_cast<unsigned char>(c)));
}

/// The end of a sequence held out: the last share to test, the one before it to validation.
template <class Range>
void split_tail(const Range& text, double share, Corpus& corpus) {
  const std::size_t n = text.size(), part = std::size_t(double(n) * share);
  const auto copy = [&](std::size_t from, std::size_t to, std::vector<Token>& out) {
    for (std::size_t i = from; i < to; ++i) {
      if constexpr (std::is_same_v<Range, std::string>)
        out.push_back(Token(static_cast<unsigned char>(text[i])));
      else
        out.push_back(text[i]);
    }
  };
  copy(0, n - 2 * part, corpus.train);
  copy(n - 2 * part, n - part, corpus.validation);
  copy(n - part, n, corpus.test);
}

void check_length(const Corpus& c, const CorpusOptions& o, const std::vector<std::string>& paths) {
  const auto need = std::size_t(o.window) + 1;
  const std::size_t all = c.train.size() + c.validation.size() + c.test.size();
  for (const auto& [name, part] : {std::pair{"training", &c.train}, {"validation", &c.validation}, {"test", &c.test}})
    if (part->size() < need)
      throw ArgumentError(message("the text of '", paths.front(), paths.size() > 1 ? "' and others" : "'",
                                  " is too short: its ", all, " tokens leave ", part->size(), " for ", name,
                                  ", a window needs ", need));
}

void check_options(const std::vector<std::string>& paths, const CorpusOptions& o) {
  if (paths.empty()) throw ArgumentError("load_text: expected at least one path, got none");
  if (o.window < 1) throw ArgumentError(message("load_text: window must be at least 1, got ", o.window));
  if (!(o.held_out > 0 && o.held_out <= 0.4))
    throw ArgumentError(message("load_text: the share held out must lie in (0, 0.4], got ", o.held_out));
}

}  // namespace

Corpus load_text(const std::vector<std::string>& paths, const CorpusOptions& options) {
  check_options(paths, options);
  Corpus corpus;
  CorpusReport& report = corpus.report;
  const FileList list = list_files(paths, report);
  std::vector<std::string> texts;
  std::unordered_set<std::uint64_t> seen;
  for (const std::string& file : list.files) {
    const bool named = list.named.count(file) > 0;
    std::string text;
    try {
      text = lowrank::io::read_text(file);
    } catch (const IoError&) {
      if (named) throw;
      ++report.unreadable;
      continue;
    }
    if (text.empty()) {
      if (named) throw IoError(file, "expected text, the file is empty");
      ++report.empty;
      continue;
    }
    if (const std::size_t at = first_binary_byte(text); at != std::string::npos) {
      if (named)
        throw IoError(
            file, message("expected text, found byte ", int(static_cast<unsigned char>(text[at])), " at offset ", at));
      ++report.binary;
      continue;
    }
    ++report.files;
    report.bytes += text.size();
    std::string kept = without_repeats(text, seen);
    report.duplicates += text.size() - kept.size();
    if (!kept.empty()) texts.push_back(std::move(kept));
  }
  if (texts.empty())
    throw IoError(paths.front(), message("expected text files, found ", report.binary, " binary, ", report.empty,
                                         " empty and ", report.unreadable, " unreadable ones"));

  report.whole_files = texts.size() >= 20;
  if (!report.whole_files) {
    for (const std::string& text : texts) split_tail(text, options.held_out, corpus);
  } else {
    // Files in an order drawn by the seed go to test, then to validation, until each has its share; one that would
    // overfill it is trained on.
    std::size_t all = 0;
    for (const std::string& t : texts) all += t.size();
    const auto share = std::size_t(double(all) * options.held_out);
    std::vector<std::size_t> order(texts.size());
    std::iota(order.begin(), order.end(), std::size_t(0));
    const lowrank::CounterRng rng(options.seed, 0x5eed);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return rng.bits(a) < rng.bits(b); });
    std::vector<int> part(texts.size(), 0);
    std::size_t filled[3] = {0, 0, 0};
    for (const std::size_t i : order)
      for (const int p : {1, 2})
        if (part[i] == 0 && filled[p] < share && filled[p] + texts[i].size() <= share + share / 2) {
          part[i] = p;
          filled[p] += texts[i].size();
        }
    for (std::size_t i = 0; i < texts.size(); ++i)
      append(part[i] == 0 ? corpus.train : part[i] == 1 ? corpus.test : corpus.validation, texts[i]);
  }
  check_length(corpus, options, paths);
  return corpus;
}

Corpus load_tokens(const std::vector<std::string>& paths, const CorpusOptions& options, int bits, Index vocabulary) {
  check_options(paths, options);
  if (bits != 16 && bits != 32) throw ArgumentError(message("load_tokens: bits must be 16 or 32, got ", bits));
  Corpus corpus;
  for (const std::string& path : paths) {
    std::vector<std::int64_t> ids;
    if (path.ends_with(".npy")) {
      ids = lowrank::io::NpyFile(path)->to_integers();
    } else {
      const std::string bytes = lowrank::io::read_text(path, std::uint64_t(1) << 34);
      const std::size_t width = std::size_t(bits) / 8;
      if (bytes.empty() || bytes.size() % width != 0)
        throw IoError(path, message("expected ", bits, "-bit token ids, the file has ", bytes.size(), " bytes"));
      for (std::size_t i = 0; i < bytes.size(); i += width) {
        std::int64_t id = 0;
        for (std::size_t b = width; b-- > 0;) id = id << 8 | static_cast<unsigned char>(bytes[i + b]);
        ids.push_back(id);
      }
    }
    std::vector<Token> tokens;
    for (const std::int64_t id : ids) {
      if (id < 0 || id >= vocabulary)
        throw IoError(path, message("token ", tokens.size(), " is ", id, ", the vocabulary has ", vocabulary));
      tokens.push_back(Token(id));
    }
    ++corpus.report.files;
    corpus.report.bytes += ids.size() * sizeof(Token);
    split_tail(tokens, options.held_out, corpus);
  }
  check_length(corpus, options, paths);
  return corpus;
}

Batch random_batch(const std::vector<Token>& tokens, Index count, Index window, std::uint64_t seed,
                   std::uint64_t step) {
  Batch batch{count, window, {}, {}};
  batch.inputs.reserve(std::size_t(count * window));
  batch.targets.reserve(std::size_t(count * window));
  const lowrank::CounterRng rng(seed, 0xba7c4);
  for (Index i = 0; i < count; ++i) {
    const std::uint64_t places = tokens.size() - std::size_t(window);
    const auto start =
        tokens.begin() + std::ptrdiff_t(rng.below(step * std::uint64_t(count) + std::uint64_t(i), places));
    batch.inputs.insert(batch.inputs.end(), start, start + window);
    batch.targets.insert(batch.targets.end(), start + 1, start + window + 1);
  }
  return batch;
}

std::vector<Batch> even_batches(const std::vector<Token>& tokens, Index count, Index window, Index windows_a_batch) {
  const Index available = (Index(tokens.size()) - 1) / window;
  count = std::min(count, available);
  std::vector<Batch> batches;
  for (Index i = 0; i < count; ++i) {
    if (i % windows_a_batch == 0) batches.push_back({0, window, {}, {}});
    Batch& b = batches.back();
    const auto start = tokens.begin() + available * i / count * window;
    ++b.batch;
    b.inputs.insert(b.inputs.end(), start, start + window);
    b.targets.insert(b.targets.end(), start + 1, start + window + 1);
  }
  return batches;
}

}  // namespace llama
