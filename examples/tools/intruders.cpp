// SPDX-License-Identifier: Apache-2.0
// lowrank intruders: leading directions of tuned weights that the base does not have, matrix by matrix.
#include <lowrank/spectrum/intruders.hpp>

#include <cstdio>
#include <optional>

#include "spectrum_scan.hpp"

namespace lowrank::tool::intruders_command {
namespace {

struct Options {
  ScanOptions scan;
  std::string base, tuned, filter;
  IntruderOptions intruders;
};

Json entry(const std::string& name, Index rows, Index cols, const IntruderReport& r) {
  Json vectors = Json::array();
  for (const auto& v : r.vectors)
    vectors.push_back({{"singular_value", v.singular_value},
                       {"intruder", v.intruder},
                       {"cosine", v.cosine},
                       {"proof", proof_name(v.proof)},
                       {"steps", v.steps}});
  const auto list = r.intruders();
  return {{"name", name},
          {"rows", rows},
          {"cols", cols},
          {"intruders", list},
          {"count", list.size()},
          {"energy_share", r.energy_share},
          {"full_svd", r.used_full_svd},
          {"vectors", vectors}};
}

double cost(Index m, Index n) { return double(m) * double(n); }

/// The tuned weight is a checkpoint's.
template <class T>
Json pair_entry(const MatrixPair& p, const IntruderOptions& o) {
  const Matrix<T> W = values_of<T>(*p.first), W1 = values_of<T>(*p.second);
  Json j = entry(p.first->name, p.first->rows, p.first->cols, find_intruders(W, W1, o));
  say_storage(j, {{"base_scale", p.first}, {"tuned_scale", p.second}});
  return j;
}

/// The tuned weight is W + s·B·A.
template <class T>
Json pair_entry(const ModulePair& p, const IntruderOptions& o) {
  const Matrix<T> W = values_of<T>(*p.weight);
  const MatrixView<const T> v = W.view();
  const auto& f = p.module->factors;
  Json j = entry(p.module->name, f.out_features(), f.in_features(),
                 find_intruders(p.transposed ? v.transposed() : v, factors_as<T>(f), o));
  say_storage(j, {{"base_scale", p.weight}});
  return j;
}

void run(const Options& o) {
  o.scan.check({o.base, o.tuned});
  const io::Checkpoint base(checkpoint_path(o.base));
  std::vector<Skipped> skipped;
  const auto list = matrices_of(base, skipped);
  std::vector<ScanJob> jobs;
  std::optional<io::Checkpoint> tuned;
  std::optional<io::PeftAdapter> adapter;
  std::vector<MatrixTensor> tuned_list;
  std::vector<std::string> names;
  if (is_adapter(o.tuned)) {
    adapter.emplace(io::read_peft(o.tuned));
    names = names_of(adapter->modules);
    for (const ModulePair& p : pairs_of(*adapter, list, o.filter, skipped)) {
      if (!p.module->magnitude.empty()) {
        skipped.push_back({p.module->name, "uses DoRA; merge it first and compare the checkpoints", true});
        continue;
      }
      jobs.push_back({p.module->name, p.weight->bytes(), cost(p.weight->rows, p.weight->cols), [&o, p] {
                        return with_precision(p.weight->is_double(),
                                              [&]<class T>(T) { return pair_entry<T>(p, o.intruders); });
                      }});
    }
  } else {
    tuned.emplace(checkpoint_path(o.tuned));
    std::vector<Skipped> same_again;  // what both hold is skipped once
    tuned_list = matrices_of(*tuned, same_again);
    names = names_of(list);
    for (const MatrixPair& p : pairs_of(list, tuned_list, "the tuned checkpoint", o.filter, skipped))
      jobs.push_back({p.first->name, p.bytes(), cost(p.first->rows, p.first->cols), [&o, p] {
                        return with_precision(p.is_double(), [&]<class T>(T) { return pair_entry<T>(p, o.intruders); });
                      }});
  }
  expect_something(o.tuned, o.filter, jobs.size(), names, skipped);
  note_quantised(o.scan.common, {&list, &tuned_list});
  const std::string settings = text("intruders k ", o.intruders.k, " epsilon ", o.intruders.epsilon);
  auto result = run_scan(o.scan, "intruders", fingerprint({o.base, o.tuned}, settings), jobs);
  result.skipped.insert(result.skipped.end(), skipped.begin(), skipped.end());
  std::string table = "intruders  energy  matrix\n";
  char line[64];
  for (const Json& j : result.matrices) {
    std::snprintf(line, sizeof line, "%5d/%-3d %7.4f  ", int(j["count"].get<std::size_t>()), int(j["vectors"].size()),
                  j["energy_share"].get<double>());
    table += line + j["name"].get<std::string>() + (j["full_svd"].get<bool>() ? "  (full SVD)" : "") + "\n";
  }
  finish_scan(o.scan, std::move(result),
              {{"command", "intruders"},
               {"base", o.base},
               {"tuned", o.tuned},
               {"k", o.intruders.k},
               {"epsilon", o.intruders.epsilon}},
              table);
}

void add_intruders(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("intruders", "Leading directions of tuned weights that the base does not have");
  sub->add_option("base", o->base, "A .safetensors file or a Hugging Face directory")->required();
  sub->add_option("tuned", o->tuned, "The tuned checkpoint, or a PEFT adapter directory")->required();
  sub->add_option("-k,--k", o->intruders.k, "Leading left singular vectors that are judged")
      ->capture_default_str()
      ->check(count());
  sub->add_option("--epsilon", o->intruders.epsilon, "|cos| below this with every vector of the base makes an intruder")
      ->capture_default_str()
      ->check(between(1e-9, 1.0));
  sub->add_option("--filter", o->filter, "Only matrices whose name contains this");
  o->scan.add_to(sub);
  sub->callback([o, sub] {
    o->scan.expect_all_used(sub);
    run(*o);
  });
}

const Registration registration{61, "intruders", add_intruders};

}  // namespace
}  // namespace lowrank::tool::intruders_command
