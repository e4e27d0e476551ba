// SPDX-License-Identifier: Apache-2.0
// lowrank merge: an adapter into its base, with a report of what the base's storage kept of the update.
#include <lowrank/adapter/merge.hpp>
#include <lowrank/init/initialised.hpp>
#include <lowrank/quant/merge.hpp>

#include <filesystem>
#include <map>
#include <set>

#include "merge_packed.hpp"
#include "models.hpp"

namespace lowrank::tool::merge_command {
namespace {
namespace fs = std::filesystem;

struct Options {
  Common common;
  std::string base, adapter, output;
  double min_correlation = 0.9;
  bool allow_lossy = false, changed_base = false, dry_run = false;
  [[nodiscard]] RequantiseOptions limits() const {  // a dry run reports what would be refused
    return {.min_correlation = min_correlation, .allow_lossy = allow_lossy || dry_run};
  }
};

/// What tells whether a base is the one an adapter stands on.
class BaseCheck {
 public:
  /// **Throws** IoError where it is plain that it is not, or cannot be known.
  BaseCheck(const Options& o, const io::PeftAdapter& adapter, const io::Checkpoint& base)
      : path_(o.adapter), base_(o.base), mark_(adapter.changed_base), trusted_(o.changed_base) {
    if (!mark_) {
      const auto of_base = io::read_changed_base(model_directory(base_));
      if (of_base && !trusted_)
        throw IoError(path_, "carries no mark that it stands on " + base_ + ", " +
                                 changed_base_phrase(*of_base, "another") + "; say " + changed_base_flag +
                                 " if it was trained on that");
      return;
    }
    if (mark_->weights.empty() && !trusted_) refuse("and nothing in it tells whether " + base_ + " is that one");
    for (const auto& [name, print] : mark_->weights) {
      const auto suffix = std::string_view(".weight").size();
      if (!base.find(name))
        refuse_or_count(name, "which has no such weight");
      else if (name.size() <= suffix || adapter.find(name.substr(0, name.size() - suffix)) == nullptr)
        refuse_or_count(name, "and the adapter has no factors for that weight, which was changed too");
    }
  }
  /// Looks at a weight, before it is merged into.
  void expect(const io::TensorView& weight) {
    if (!mark_) return;
    const auto known = mark_->weights.find(weight.name());
    if (known != mark_->weights.end() && known->second != io::fingerprint(weight))
      refuse_or_count(weight.name(), "and this weight is another one there");
  }
  /// "original": nothing says otherwise; "confirmed" by all fingerprints; "asserted" by the user.
  [[nodiscard]] const char* verdict() const {
    return !mark_ && !trusted_                                      ? "original"
           : mark_ && strangers_.empty() && !mark_->weights.empty() ? "confirmed"
                                                                    : "asserted";
  }
  [[nodiscard]] std::size_t strangers() const { return strangers_.size(); }

 private:
  [[noreturn]] void refuse(const std::string& why, const std::string& weight = {}) const {
    const std::string what = "stands on " + changed_base_phrase(*mark_) + ", " + why + "; merge into that base, or " +
                             (mark_->kind == "residual" ? "`undo` the adapter first, or " : "") + "say " +
                             changed_base_flag + " if you know that the base is the right one";
    if (weight.empty()) throw IoError(path_, what);
    throw IoError(path_, weight, what);
  }
  void refuse_or_count(const std::string& weight, const std::string& why) {
    if (!trusted_) refuse("not on " + base_ + ", " + why, weight);
    strangers_.insert(weight);
  }

  std::string path_, base_;
  std::optional<io::ChangedBase> mark_;
  bool trusted_;
  std::set<std::string> strangers_;
};

/// A tensor's elements as a matrix of S: rows of the first extent, everything else folded (a convolution's kernel).
template <class S>
Matrix<S> folded(const io::TensorView& t) {
  Matrix<S> m;
  const Index rows = t.shape().empty() ? 1 : Index(t.shape()[0]);
  m.resize(rows, rows == 0 ? 0 : t.size() / rows);
  t.copy_bytes(reinterpret_cast<std::byte*>(m.data()));
  return m;
}

/// ΔW as it lies on the stored weight.
template <class T>
LoraFactors<T> stored_factors(const io::AdapterModule& m, bool fan_in_fan_out) {
  LoraFactors<T> f;
  f.scale = T(m.factors.scale);
  if (lies_transposed(m.kind, fan_in_fan_out)) {
    f.A = Matrix<T>(m.factors.B.view().transposed());
    f.B = Matrix<T>(m.factors.A.view().transposed());
  } else {
    f.A = Matrix<T>(m.factors.A);
    f.B = Matrix<T>(m.factors.B);
  }
  return f;
}

/// DoRA in place: rows of W + s·B·A scaled to the magnitudes, W out×in. The update that counts is the whole change of
/// W.
/// **Throws** as checked_merge; W is then of no use.
template <class S, class T>
MergeReport merge_dora(MatrixView<S> W, const LoraFactors<T>& f, const std::vector<float>& magnitude,
                       const RequantiseOptions& o) {
  lowrank::detail::check_merge_shapes("merge", f, W.rows(), W.cols());
  lowrank::detail::expect_shape("merge", "lora_magnitude_vector", Index(magnitude.size()), Index(1), W.rows(),
                                Index(1));
  lowrank::detail::MergeSums sums(W.rows());
  lowrank::detail::for_delta_rows(f, [&](Index i, const T* delta) {
    double norm = 0;
    for (Index j = 0; j < W.cols(); ++j) norm += std::pow(double(W(i, j)) + double(delta[j]), 2);
    // A row of zeros has no direction to give the magnitude to.
    const double factor = norm > 0 ? double(magnitude[std::size_t(i)]) / std::sqrt(norm) : norm;
    Index changed = 0;
    for (Index j = 0; j < W.cols(); ++j) {
      const double before = double(W(i, j)), exact = factor * (before + double(delta[j]));
      W(i, j) = S(T(exact));
      changed += double(W(i, j)) != before;
      sums.add(i, before, double(W(i, j)), exact - before);
    }
    sums.count_changed(i, changed);
  });
  MergeReport report = sums.report(double(W.size()));
  if (!std::isfinite(report.effective_norm) || !std::isfinite(report.intended_norm))
    throw NonFiniteError("merge: the merged weight is not finite in its storage type");
  if (report.correlation < o.min_correlation && !o.allow_lossy) {
    report.suggestion = "float, or keep the adapter apart";
    lowrank::detail::refuse("merge", report, o);
  }
  return report;
}

/// Merges one module into a copy of its weight; returns the bytes to write.
template <class S>
std::vector<std::byte> merged_bytes(const Options& o, const io::TensorView& t, const io::AdapterModule& m,
                                    bool fan_in_fan_out, MergeReport& report) {
  using T = arithmetic_of<S>;
  Matrix<S> W = folded<S>(t);
  try {
    if (m.magnitude.empty())
      report = checked_merge<T>(W, stored_factors<T>(m, fan_in_fan_out), o.limits());
    else
      report = merge_dora(lies_transposed(m.kind, fan_in_fan_out) ? W.view().transposed() : W.view(),
                          LoraFactors<T>{Matrix<T>(m.factors.A), Matrix<T>(m.factors.B), T(m.factors.scale)},
                          m.magnitude, o.limits());
  } catch (const MergeRefused& e) {
    t.fail(std::string(e.what()) + " (--allow-lossy merges anyway)");
  } catch (const Error& e) {
    t.fail(e.what());
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
    t.copy_bytes(reinterpret_cast<std::byte*>(bias.data()));
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
  const io::Checkpoint base(checkpoint_path(o.base));
  const io::PeftAdapter adapter = read_adapter(o.adapter);
  BaseCheck check(o, adapter, base);
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
      if (m.factors.B.cols() != m.factors.rank())
        throw IoError(o.adapter, m.name,
                      "is a grouped convolution (lora_A " + io::shape_text(m.a_shape) + ", lora_B " +
                          io::shape_text(m.b_shape) + "), which merge does not support");
      if (s.size() != 4 || Index(s[0]) != m.factors.out_features() || inner != m.factors.in_features())
        throw IoError(o.adapter, m.name,
                      "is a convolution of another shape: the weight is " + io::shape_text(s) + ", lora_A " +
                          io::shape_text(m.a_shape) + ", lora_B " + io::shape_text(m.b_shape));
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
  std::vector<std::string> notes;  // said when the work is done: an error is one line alone
  if (adapter.find("model.embed_tokens") != nullptr && !base.find("lm_head.weight"))
    notes.push_back(
        "the output head is tied to the embedding: merging changes both, unmerged only the embedding was adapted");

  // PEFT goes by what a layer is, whatever fan_in_fan_out says; so does the family.
  const auto in_by_out = [&](std::size_t k) { return modules.in_by_out(where[k], adapter.config.fan_in_fan_out); };
  for (std::size_t k = 0; k < where.size(); ++k)
    if (adapter.modules[k].kind == ModuleKind::linear && in_by_out(k) != adapter.config.fan_in_fan_out &&
        modules.need_fan_in_fan_out(where) != adapter.config.fan_in_fan_out) {
      notes.push_back(std::string("the adapter says fan_in_fan_out ") +
                      (adapter.config.fan_in_fan_out ? "true" : "false") + ", but the base, a " +
                      modules.config->model_type + ", has its weights " + (in_by_out(k) ? "in x out" : "out x in") +
                      "; that counts");
      break;
    }

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
  const auto size_of = [&](std::size_t k) {
    return modules.infos[where[k]].rows > 0 ? modules.infos[where[k]].rows * modules.infos[where[k]].cols
                                            : modules.weights[where[k]].size();
  };
  PackedMerge packed(
      base, o.limits(),
      [&](const std::string& weight) {
        check.expect(base[weight]);
        return stored_factors<float>(adapter.modules[of_tensor.at(weight)], in_by_out(of_tensor.at(weight)));
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
                               check.expect(t);
                               out.write(t.name(), merged(o, t, adapter.modules[k], in_by_out(k), r));
                               account(adapter.modules[k].name, t.size(), r);
                             }};
  };
  if (o.dry_run) {
    for (std::size_t k = 0; k < where.size(); ++k) {
      throw_if_interrupted();
      MergeReport r;
      const io::TensorView& weight = modules.weights[where[k]];
      if (weight.dtype() == io::Dtype::U8) {
        r = packed.report(weight.name());
      } else {
        check.expect(weight);
        (void)merged(o, weight, adapter.modules[k], in_by_out(k), r);
      }
      modules.weights[where[k]].drop();
      account(adapter.modules[k].name, size_of(k), r);
    }
  } else {
    std::unique_ptr<Finishing> finishing;
    io::StagedFiles files = stage_interruptibly(o.common, "merge", base, o.output, rewrite, finishing);
    if (!o.output.ends_with(".safetensors")) {
      (void)stage_model_files(o.base, o.output, files);
      files.remove((fs::path(o.output) / io::changed_base_file).string());  // what was here may have been another base
    }
    files.commit();
  }
  if (check.strangers() > 0)
    notes.push_back(
        lowrank::detail::text(check.strangers(), " weights of the base are not the ones the adapter was made with"));
  for (const std::string& line : notes) note(o.common, line);
  const double lost = intended2 > 0 ? std::sqrt(lost2 / intended2) : 0, share = values > 0 ? changed / values : 0;
  const Json report = {{"command", "merge"},
                       {"applied", where.size()},
                       {"total", adapter.modules.size()},
                       {"changed_share", share},
                       {"lost", lost},
                       {"least_correlation", worst},
                       {"base", check.verdict()},
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
      ->check(between(-1.0, 1.0));
  sub->add_flag("--allow-lossy", o->allow_lossy, "Merge whatever is lost");
  sub->add_flag(changed_base_flag, o->changed_base,
                "BASE is the base that was changed with the adapter (PiSSA, LoftQ, ...), whatever the marks say");
  sub->add_flag("--dry-run", o->dry_run, "Report what would be lost, write nothing");
  sub->callback([o] { run(*o); });
}

const Registration registration{45, "merge", add_merge};

}  // namespace
}  // namespace lowrank::tool::merge_command
