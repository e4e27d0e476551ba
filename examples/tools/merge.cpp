// SPDX-License-Identifier: Apache-2.0
// lowrank merge: an adapter into its base, with a report of what the base's storage kept of the update.
#include <lowrank/adapter/merge.hpp>
#include <lowrank/init/initialised.hpp>
#include <lowrank/quant/merge_report.hpp>

#include <filesystem>
#include <map>

#include "merge_packed.hpp"
#include "models.hpp"

namespace lowrank::tool::merge_command {
namespace {
namespace fs = std::filesystem;

struct Options {
  Common common;
  std::string base, adapter, output;
  double min_correlation = 0.9;
  bool allow_lossy = false, dry_run = false;
};

/// A tensor's elements as a matrix of S: rows of the first extent, everything else folded (a convolution's kernel).
template <class S>
Matrix<S> folded(const io::TensorView& t) {
  Matrix<S> m;
  const Index rows = t.shape().empty() ? 1 : Index(t.shape()[0]);
  m.resize(rows, rows == 0 ? 0 : t.size() / rows);
  if (m.size() > 0) std::memcpy(m.data(), t.bytes().data(), t.bytes().size());
  return m;
}

/// ΔW as it lies on the stored weight: transposed for embeddings and in×out storage.
template <class T>
LoraFactors<T> stored_factors(const io::AdapterModule& m, bool fan_in_fan_out) {
  LoraFactors<T> f;
  f.scale = T(m.factors.scale);
  if (m.kind == ModuleKind::embedding || (fan_in_fan_out && m.kind == ModuleKind::linear)) {
    f.A = Matrix<T>(m.factors.B.view().transposed());
    f.B = Matrix<T>(m.factors.A.view().transposed());
  } else {
    f.A = Matrix<T>(m.factors.A);
    f.B = Matrix<T>(m.factors.B);
  }
  return f;
}

/// DoRA: rows of W + s·B·A scaled to the magnitudes. The report compares with the exact result.
template <class S, class T>
MergeReport merge_dora(MatrixView<S> W, const LoraFactors<T>& f, const std::vector<float>& magnitude) {
  const Matrix<T> delta = delta_weight(f);
  MergeReport report;
  double dot = 0, lost = 0;
  Index changed = 0;
  for (Index i = 0; i < W.rows(); ++i) {
    double norm = 0;
    for (Index j = 0; j < W.cols(); ++j) norm += std::pow(double(W(i, j)) + double(delta(i, j)), 2);
    const double factor = norm > 0 ? double(magnitude[std::size_t(i)]) / std::sqrt(norm) : 0;
    for (Index j = 0; j < W.cols(); ++j) {
      const double before = double(W(i, j)), exact = factor * (before + double(delta(i, j)));
      const S after = S(T(exact));
      const double intended = exact - before, effective = double(after) - before;
      changed += double(after) != before;
      report.intended_norm += intended * intended;
      report.effective_norm += effective * effective;
      report.weight_norm += before * before;
      dot += intended * effective;
      lost += (effective - intended) * (effective - intended);
      W(i, j) = after;
    }
  }
  for (double* x : {&report.intended_norm, &report.effective_norm, &report.weight_norm}) *x = std::sqrt(*x);
  report.changed_share = W.size() > 0 ? double(changed) / double(W.size()) : 0;
  report.correlation = report.intended_norm == 0    ? 1
                       : report.effective_norm == 0 ? 0
                                                    : dot / report.intended_norm / report.effective_norm;
  report.lost = report.intended_norm > 0 ? std::sqrt(lost) / report.intended_norm : 0;
  return report;
}

/// Merges one module into a copy of its weight; returns the bytes to write.
template <class S>
std::vector<std::byte> merged_bytes(const Options& o, const io::TensorView& t, const io::AdapterModule& m,
                                    bool fan_in_fan_out, MergeReport& report) {
  using T = arithmetic_of<S>;
  Matrix<S> W = folded<S>(t);
  if (m.magnitude.empty()) {
    const RequantiseOptions limits{.min_correlation = o.min_correlation, .allow_lossy = o.allow_lossy};
    try {
      report = checked_merge<T>(W, stored_factors<T>(m, fan_in_fan_out), limits);
    } catch (const MergeRefused& e) {
      t.fail(std::string(e.what()) + " (--allow-lossy merges anyway)");
    } catch (const Error& e) {
      t.fail(e.what());
    }
  } else {
    report = merge_dora(fan_in_fan_out ? W.view().transposed() : W.view(), stored_factors<T>(m, false), m.magnitude);
  }
  const auto bytes = std::as_bytes(std::span(W.data(), std::size_t(W.size())));
  return {bytes.begin(), bytes.end()};
}

constexpr const char* cannot_merge = ", which cannot be merged into";

std::vector<std::byte> merged(const Options& o, const io::TensorView& t, const io::AdapterModule& m,
                              bool fan_in_fan_out, MergeReport& report) {
  return with_stored_type(t, cannot_merge,
                          [&]<class S>(S) { return merged_bytes<S>(o, t, m, fan_in_fan_out, report); });
}

/// The bias of a layer with s times that of lora_B added, in the type it is stored as.
std::vector<std::byte> merged_bias(const io::TensorView& t, const io::AdapterModule& m) {
  return with_stored_type(t, cannot_merge, [&]<class S>(S) {
    using T = arithmetic_of<S>;
    std::vector<S> bias(static_cast<std::size_t>(t.size()));
    if (!bias.empty()) std::memcpy(bias.data(), t.bytes().data(), t.bytes().size());
    for (std::size_t i = 0; i < bias.size(); ++i) {
      bias[i] = S(T(bias[i]) + T(m.factors.scale) * T(m.bias[i]));
      if (!std::isfinite(double(bias[i]))) t.fail("is not finite after the merge");
    }
    const auto b = std::as_bytes(std::span(bias));
    return std::vector<std::byte>(b.begin(), b.end());
  });
}

void run(const Options& o) {
  expect_different(o.base, o.output);
  expect_different(o.adapter, o.output);
  const io::Checkpoint base(o.base);
  const io::PeftAdapter adapter = io::read_peft(o.adapter);
  if (const auto original = adapter.metadata.find("lowrank_original_base"); original != adapter.metadata.end()) {
    std::error_code ignored;
    if (fs::equivalent(original->second, o.base, ignored) && !ignored)
      throw IoError(o.adapter, "stands on the base that was written beside it, not on the original " + o.base);
  }
  const Modules modules(base, true);
  std::string summary;
  const std::vector<std::size_t> where = match_adapter(o.adapter, adapter, modules, summary);
  std::map<std::string, std::size_t> of_tensor, of_bias, of_part;
  for (std::size_t k = 0; k < where.size(); ++k) {
    const io::AdapterModule& m = adapter.modules[k];
    const io::TensorView& weight = modules.weights[where[k]];
    const bool packed = weight.dtype() == io::Dtype::U8;
    if (packed && !m.magnitude.empty())
      throw IoError(o.adapter, m.name, "is a DoRA adapter on a 4-bit weight, which merge does not support");
    if (!m.bias.empty()) {
      const auto bias = base.find(m.name + ".bias");
      if (!bias || bias->size() != Index(m.bias.size()))
        throw IoError(o.adapter, m.name,
                      bias ? "has a bias on lora_B of another length than the layer's"
                           : "has a bias on lora_B, but the layer has none to merge it into");
      of_bias[bias->name()] = k;
    }
    if (packed)
      for (const std::string& part : PackedMerge::parts(base, weight.name())) of_part[part] = k;
    if (m.kind == ModuleKind::conv) {
      const auto& s = modules.weights[where[k]].shape();
      Index inner = 1;
      for (std::size_t d = 1; d < s.size(); ++d) inner *= Index(s[d]);
      if (s.size() != 4 || Index(s[0]) != m.factors.out_features() || inner != m.factors.in_features() ||
          m.factors.B.cols() != m.factors.rank())
        throw IoError(o.adapter, m.name,
                      "is a convolution of another shape, or a grouped one, which merge does not support");
    }
    of_tensor[weight.name()] = k;
  }
  std::map<std::string, const io::SavedTensor*> replaced;
  for (const io::SavedTensor& t : adapter.saved) {
    std::string name = t.spec.name;
    if (const auto at = name.rfind(".base_layer."); at != std::string::npos)
      name.erase(at, std::string_view(".base_layer").size());
    if (!base.find(name))
      throw IoError(o.adapter, t.spec.name, "is saved with the adapter, but the base has no such tensor");
    if (of_tensor.contains(name)) continue;  // the wrapped weight of an adapted module: the base itself
    replaced[name] = &t;
  }
  // An output head tied to the embedding has no tensor of its own: adapting the embedding would change both.
  if (adapter.find("model.embed_tokens") != nullptr && !base.find("lm_head.weight"))
    note(o.common,
         "the output head is tied to the embedding: merging changes both, unmerged only the embedding was adapted");

  Json reports = Json::array();
  double changed = 0, values = 0, intended2 = 0, lost2 = 0, worst = 1;
  const auto account = [&](const std::string& name, Index size, const MergeReport& r) {
    changed += r.changed_share * double(size);
    values += double(size);
    intended2 += r.intended_norm * r.intended_norm;
    lost2 += std::pow(r.lost * r.intended_norm, 2);
    worst = std::min(worst, r.correlation);
    reports.push_back({{"name", name},
                       {"changed_share", r.changed_share},
                       {"correlation", r.correlation},
                       {"lost", r.lost},
                       {"intended_norm", r.intended_norm},
                       {"effective_norm", r.effective_norm},
                       {"weight_norm", r.weight_norm}});
  };
  // A dry run reports what would be refused.
  const RequantiseOptions limits{.min_correlation = o.min_correlation, .allow_lossy = o.allow_lossy || o.dry_run};
  const auto size_of = [&](std::size_t k) {
    return modules.infos[where[k]].rows > 0 ? modules.infos[where[k]].rows * modules.infos[where[k]].cols
                                            : modules.weights[where[k]].size();
  };
  PackedMerge packed(
      base, limits,
      [&](const std::string& weight) {
        return stored_factors<float>(adapter.modules[of_tensor.at(weight)], adapter.config.fan_in_fan_out);
      },
      [&](const std::string& weight, const MergeReport& r) {
        const std::size_t k = of_tensor.at(weight);
        account(adapter.modules[k].name, size_of(k), r);
      });
  const auto rewrite = [&](const io::TensorView& t) -> std::optional<io::TensorRewrite> {
    if (const auto k = of_bias.find(t.name()); k != of_bias.end())
      return io::TensorRewrite{{{t.name(), t.dtype(), t.shape()}}, [&, t, k = k->second](io::SafeTensorsWriter& out) {
                                 out.write(t.name(), merged_bias(t, adapter.modules[k]));
                               }};
    if (const auto k = of_part.find(t.name()); k != of_part.end()) {
      const std::string& weight = modules.weights[where[k->second]].name();
      return io::TensorRewrite{
          {packed.spec(weight, t.name())},
          [&, name = t.name(), weight](io::SafeTensorsWriter& out) { out.write(name, packed.bytes(weight, name)); }};
    }
    if (const auto r = replaced.find(t.name()); r != replaced.end())
      return io::TensorRewrite{
          {{t.name(), r->second->spec.dtype, r->second->spec.shape}},
          [saved = r->second, name = t.name()](io::SafeTensorsWriter& out) { out.write(name, saved->bytes); }};
    const auto k = of_tensor.find(t.name());
    if (k == of_tensor.end()) return std::nullopt;
    return io::TensorRewrite{{{t.name(), t.dtype(), t.shape()}}, [&, t, k = k->second](io::SafeTensorsWriter& out) {
                               MergeReport r;
                               out.write(t.name(), merged(o, t, adapter.modules[k], adapter.config.fan_in_fan_out, r));
                               account(adapter.modules[k].name, t.size(), r);
                             }};
  };
  if (o.dry_run) {
    for (std::size_t k = 0; k < where.size(); ++k) {
      throw_if_interrupted();
      MergeReport r;
      Options lossy = o;
      lossy.allow_lossy = true;
      const io::TensorView& weight = modules.weights[where[k]];
      if (weight.dtype() == io::Dtype::U8)
        r = packed.report(weight.name());
      else
        (void)merged(lossy, weight, adapter.modules[k], adapter.config.fan_in_fan_out, r);
      modules.weights[where[k]].drop();
      account(adapter.modules[k].name, size_of(k), r);
    }
  } else {
    const auto finishing = rewrite_interruptibly(o.common, "merge", base, o.output, rewrite);
    if (!o.output.ends_with(".safetensors")) copy_model_files(o.base, o.output);
  }
  const double lost = intended2 > 0 ? std::sqrt(lost2 / intended2) : 0, share = values > 0 ? changed / values : 0;
  const Json report = {{"command", "merge"},
                       {"applied", where.size()},
                       {"total", adapter.modules.size()},
                       {"changed_share", share},
                       {"lost", lost},
                       {"least_correlation", worst},
                       {"output", o.output},
                       {"dry_run", o.dry_run},
                       {"modules", std::move(reports)}};
  print(o.common, report,
        summary + "\n" + "stored values changed: " + number(100 * share) + " %; update lost to rounding: " +
            number(100 * lost) + " % of its norm; least correlation of a module: " + number(worst) + "\n" +
            (o.dry_run ? "would write " : "wrote ") + o.output + "\n");
}

void add_merge(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = add_command(app, "merge", "Merge an adapter into its base, and report what rounding lost", o->common);
  sub->add_option("base", o->base, "A .safetensors file or a Hugging Face directory")->required();
  sub->add_option("adapter", o->adapter, "PEFT directory")->required();
  sub->add_option("-o,--output", o->output, "Directory to write (or a .safetensors file for one)")->required();
  sub->add_option("--min-correlation", o->min_correlation,
                  "Refuse when a module's effective update correlates less than this with the intended one")
      ->capture_default_str()
      ->check(CLI::Range(-1.0, 1.0));
  sub->add_flag("--allow-lossy", o->allow_lossy, "Merge whatever is lost");
  sub->add_flag("--dry-run", o->dry_run, "Report what would be lost, write nothing");
  sub->callback([o] { run(*o); });
}

const Registration registration{45, "merge", add_merge};

}  // namespace
}  // namespace lowrank::tool::merge_command
