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

// ---- plan -----------------------------------------------------------------------------------------------------------

/// The inputs, and what is to be done with them. Jobs refer to it: it stays where it is.
struct Plan : ScanPlan {
  io::Checkpoint base;
  std::optional<io::Checkpoint> tuned;
  std::optional<io::PeftAdapter> adapter;
  std::vector<MatrixTensor> base_list, tuned_list;

  explicit Plan(const Options& o) : base(checkpoint_path(o.base)) {}
};

void plan_adapter(const Options& o, Plan& p) {
  p.adapter.emplace(io::read_peft(o.tuned));
  p.names = names_of(p.adapter->modules);
  for (const ModulePair& pair : pairs_of(*p.adapter, p.base_list, o.filter, p.skipped)) {
    if (!pair.module->magnitude.empty())
      p.skipped.push_back(
          {pair.module->name, SkipReason::unsupported, "uses DoRA; merge it first and compare the checkpoints"});
    else
      p.jobs.push_back(
          {pair.module->name, pair.weight->bytes(), cost(pair.weight->rows, pair.weight->cols), [&o, pair] {
             return with_precision(pair.weight->is_double(),
                                   [&]<class T>(T) { return pair_entry<T>(pair, o.intruders); });
           }});
  }
}

void plan_checkpoint(const Options& o, Plan& p) {
  p.tuned.emplace(checkpoint_path(o.tuned));
  std::vector<Skipped> same_again;  // what both hold is skipped once
  p.tuned_list = matrices_of(*p.tuned, same_again);
  p.names = names_of(p.base_list);
  for (const MatrixPair& pair : pairs_of(p.base_list, p.tuned_list, "the tuned checkpoint", o.filter, p.skipped))
    p.jobs.push_back({pair.first->name, pair.bytes(), cost(pair.first->rows, pair.first->cols), [&o, pair] {
                        return with_precision(pair.is_double(),
                                              [&]<class T>(T) { return pair_entry<T>(pair, o.intruders); });
                      }});
}

void make_plan(const Options& o, Plan& p) {
  p.base_list = matrices_of(p.base, p.skipped);
  if (is_adapter(o.tuned))
    plan_adapter(o, p);
  else
    plan_checkpoint(o, p);
  p.fingerprint = fingerprint({o.base, o.tuned}, text("intruders k ", o.intruders.k, " epsilon ", o.intruders.epsilon));
  expect_something(o.tuned, o.filter, p);
  note_quantised(o.scan.common, {&p.base_list, &p.tuned_list});
}

// ---- report ---------------------------------------------------------------------------------------------------------

std::string table_text(const ScanResult& result) {
  std::string table = "intruders  energy  matrix\n";
  char line[64];
  for (const Json& j : result.matrices) {
    std::snprintf(line, sizeof line, "%5d/%-3d %7.4f  ", int(j["count"].get<std::size_t>()), int(j["vectors"].size()),
                  j["energy_share"].get<double>());
    table += line + j["name"].get<std::string>() + (j["full_svd"].get<bool>() ? "  (full SVD)" : "") + "\n";
  }
  return table;
}

void run(const Options& o) {
  o.scan.check({o.base, o.tuned});
  Plan plan(o);
  make_plan(o, plan);
  ScanResult result = run_scan(o.scan, "intruders", plan);
  const std::string table = table_text(result);
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
