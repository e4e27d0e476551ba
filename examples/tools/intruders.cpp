// SPDX-License-Identifier: Apache-2.0
// lowrank intruders: leading directions of tuned weights that the base does not have, matrix by matrix.
#include <lowrank/spectrum/intruders.hpp>

#include <cstdio>

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

void run(const Options& o) {
  const io::Checkpoint base(o.base);
  std::vector<Skipped> skipped;
  const auto list = matrices_of(base, skipped);
  std::vector<ScanJob> jobs;
  std::optional<io::Checkpoint> tuned;
  std::optional<io::PeftAdapter> adapter;
  std::vector<MatrixTensor> tuned_list;
  std::error_code ignored;
  if (std::filesystem::exists(std::filesystem::path(o.tuned) / "adapter_config.json", ignored)) {
    adapter.emplace(io::read_peft(o.tuned));
    for (const auto& module : adapter->modules) {
      if (!selected(module.name, o.filter)) continue;
      const MatrixTensor* w = find_matrix(list, module.name + ".weight");
      const Index m = module.factors.out_features(), n = module.factors.in_features();
      const bool transposed = module.kind == ModuleKind::embedding || adapter->config.fan_in_fan_out;
      if (w == nullptr || module.kind == ModuleKind::conv ||
          (transposed ? w->rows != n || w->cols != m : w->rows != m || w->cols != n)) {
        skipped.push_back({module.name, "the adapter's module does not fit a matrix of the base", true});
        continue;
      }
      if (!module.magnitude.empty()) {
        skipped.push_back({module.name, "uses DoRA; merge it first and compare the checkpoints", true});
        continue;
      }
      jobs.push_back({module.name, w->bytes(), cost(m, n), [&o, &module, w, transposed] {
                        const Matrix<float> W = values_of<float>(*w);
                        const MatrixView<const float> v = W.view();
                        Json j = entry(module.name, module.factors.out_features(), module.factors.in_features(),
                                       find_intruders(transposed ? v.transposed() : v, module.factors, o.intruders));
                        say_storage(j, {{"base_scale", w}});
                        return j;
                      }});
    }
  } else {
    tuned.emplace(o.tuned);
    std::vector<Skipped> same_again;  // what both hold is skipped once
    tuned_list = matrices_of(*tuned, same_again);
    for (const auto& t : tuned_list) {
      if (!selected(t.name, o.filter)) continue;
      const MatrixTensor* b = find_matrix(list, t.name);
      if (b == nullptr || b->rows != t.rows || b->cols != t.cols) {
        skipped.push_back({t.name,
                           b == nullptr
                               ? "is not in the base"
                               : lowrank::detail::text("is ", lowrank::detail::shape_text(t.rows, t.cols), " here and ",
                                                       lowrank::detail::shape_text(b->rows, b->cols), " in the base"),
                           true});
        continue;
      }
      jobs.push_back({t.name, t.bytes() + b->bytes(), cost(t.rows, t.cols), [&o, &t, b] {
                        const Matrix<float> W = values_of<float>(*b), W1 = values_of<float>(t);
                        Json j = entry(t.name, t.rows, t.cols, find_intruders(W, W1, o.intruders));
                        say_storage(j, {{"base_scale", b}, {"tuned_scale", &t}});
                        return j;
                      }});
    }
    for (const auto& b : list)
      if (selected(b.name, o.filter) && find_matrix(tuned_list, b.name) == nullptr)
        skipped.push_back({b.name, "is only in the base", true});
  }
  note_quantised(o.scan.common, {&list, &tuned_list});
  if (jobs.empty() && skipped.empty()) throw IoError(o.base, "holds no matrices");
  const std::string settings = lowrank::detail::text("intruders k ", o.intruders.k, " epsilon ", o.intruders.epsilon);
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
      ->check(CLI::PositiveNumber);
  sub->add_option("--epsilon", o->intruders.epsilon, "|cos| below this with every vector of the base makes an intruder")
      ->capture_default_str()
      ->check(CLI::Range(1e-9, 1.0));
  sub->add_option("--filter", o->filter, "Only matrices whose name contains this");
  o->scan.add_to(sub);
  sub->callback([o] { run(*o); });
}

const Registration registration{61, "intruders", add_intruders};

}  // namespace
}  // namespace lowrank::tool::intruders_command
