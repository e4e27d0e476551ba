// SPDX-License-Identifier: Apache-2.0
// lowrank merge: an adapter into its base, with a report of what the base's storage kept of the update.
#include <lowrank/adapter/dora_merge.hpp>
#include <lowrank/init/initialised.hpp>
#include <lowrank/quant/merge.hpp>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "merge_packed.hpp"
#include "models.hpp"
#include "outputs.hpp"

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
LoraFactors<T> stored_factors(const io::AdapterModule& m, bool in_by_out) {
  LoraFactors<T> f;
  f.scale = T(m.factors.scale);
  if (lies_transposed(m.kind, in_by_out)) {
    f.A = Matrix<T>(m.factors.B.view().transposed());
    f.B = Matrix<T>(m.factors.A.view().transposed());
  } else {
    f.A = Matrix<T>(m.factors.A);
    f.B = Matrix<T>(m.factors.B);
  }
  return f;
}

/// Merges one module into a copy of its weight; returns the bytes to write.
template <class S>
std::vector<std::byte> merged_bytes(const Options& o, const io::TensorView& t, const io::AdapterModule& m,
                                    bool in_by_out, MergeReport& report) {
  using T = arithmetic_of<S>;
  Matrix<S> W = folded<S>(t);
  try {
    if (m.magnitude.empty())
      report = checked_merge<T>(W, stored_factors<T>(m, in_by_out), o.limits());
    else
      report = checked_merge<T>(lies_transposed(m.kind, in_by_out) ? W.view().transposed() : W.view(),
                                DoraFactors<T>{{Matrix<T>(m.factors.A), Matrix<T>(m.factors.B), T(m.factors.scale)},
                                               std::vector<T>(m.magnitude.begin(), m.magnitude.end())},
                                o.limits());
  } catch (const MergeRefused& e) {
    t.fail(std::string(e.what()) + " (--allow-lossy merges anyway)");
  } catch (const Error& e) {
    t.fail(e.what());
  }
  const auto bytes = std::as_bytes(std::span(W.data(), std::size_t(W.size())));
  return {bytes.begin(), bytes.end()};
}

constexpr const char* cannot_merge = ", which cannot be merged into";

std::vector<std::byte> merged(const Options& o, const io::TensorView& t, const io::AdapterModule& m, bool in_by_out,
                              MergeReport& report) {
  return with_stored_type(t, cannot_merge, [&]<class S>(S) { return merged_bytes<S>(o, t, m, in_by_out, report); });
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

// ---- plan: what each tensor of the base becomes, checked before anything is computed
// ---------------------------------

struct Plan {
  io::Checkpoint base;
  io::PeftAdapter adapter;
  BaseCheck check;
  Modules modules;
  std::string summary;             ///< how many modules found their weight
  std::vector<std::size_t> where;  ///< adapter.modules[k] belongs to modules.weights[where[k]]
  /// Tensor of the base → k: a weight, a layer's bias that gets lora_B's, a part of a 4-bit weight.
  std::map<std::string, std::size_t> of_tensor, of_bias, of_part;
  std::map<std::string, const io::SavedTensor*> replaced;  ///< tensors the adapter brings whole
  std::vector<std::string> notes;                          ///< said when the work is done: an error is one line alone

  explicit Plan(const Options& o)
      : base(checkpoint_path(o.base)),
        adapter(read_adapter(o.adapter)),
        check(o, adapter, base),
        modules(base, true),
        where(match_adapter(o.adapter, adapter, modules, summary)) {}
  [[nodiscard]] const io::TensorView& weight(std::size_t k) const { return modules.weights[where[k]]; }
  /// PEFT goes by what a layer is, whatever fan_in_fan_out says; so does the family.
  [[nodiscard]] bool in_by_out(std::size_t k) const {
    return modules.in_by_out(where[k], adapter.config.fan_in_fan_out);
  }
  [[nodiscard]] Index size(std::size_t k) const {
    const ModuleInfo& info = modules.infos[where[k]];
    return info.rows > 0 ? info.rows * info.cols : weight(k).size();
  }
};

void expect_convolution(const Options& o, const io::AdapterModule& m, const io::TensorView& weight) {
  const auto& s = weight.shape();
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

void plan_module(const Options& o, Plan& p, std::size_t k) {
  const io::AdapterModule& m = p.adapter.modules[k];
  const std::string& weight = p.weight(k).name();
  const bool packed = p.weight(k).dtype() == io::Dtype::U8;
  if (packed && !m.magnitude.empty())
    throw IoError(o.adapter, m.name, "is a DoRA adapter on a 4-bit weight, which merge does not support");
  if (!m.bias.empty()) {
    const auto bias = p.base.find(m.name + ".bias");
    if (!bias || bias->size() != Index(m.bias.size()))
      throw IoError(o.adapter, m.name,
                    bias ? "has a bias on lora_B of another length than the layer's"
                         : "has a bias on lora_B, but the layer has none to merge it into");
    p.of_bias[bias->name()] = k;
  }
  if (packed)
    for (const std::string& part : PackedMerge::parts(p.base, weight)) p.of_part[part] = k;
  if (m.kind == ModuleKind::conv) expect_convolution(o, m, p.weight(k));
  p.of_tensor[weight] = k;
}

void plan_saved(const Options& o, Plan& p, const io::SavedTensor& t) {
  std::string name = t.spec.name;
  if (const auto at = name.rfind(".base_layer."); at != std::string::npos)
    name.erase(at, std::string_view(".base_layer").size());
  if (!p.base.find(name))
    throw IoError(o.adapter, t.spec.name, "is saved with the adapter, but the base has no such tensor");
  // The wrapped weight of an adapted module is the base itself.
  if (!p.of_tensor.contains(name)) p.replaced[name] = &t;
}

void make_plan(const Options& o, Plan& p) {
  for (std::size_t k = 0; k < p.where.size(); ++k) plan_module(o, p, k);
  for (const io::SavedTensor& t : p.adapter.saved) plan_saved(o, p, t);
  // An output head tied to the embedding has no tensor of its own: adapting the embedding would change both.
  if (p.adapter.find("model.embed_tokens") != nullptr && !p.base.find("lm_head.weight"))
    p.notes.emplace_back(
        "the output head is tied to the embedding: merging changes both, unmerged only the embedding was adapted");
  const bool said = p.adapter.config.fan_in_fan_out;
  for (std::size_t k = 0; k < p.where.size(); ++k)
    if (p.adapter.modules[k].kind == ModuleKind::linear && p.in_by_out(k) != said &&
        p.modules.need_fan_in_fan_out(p.where) != said) {
      p.notes.push_back(std::string("the adapter says fan_in_fan_out ") + (said ? "true" : "false") +
                        ", but the base, a " + p.modules.config->model_type + ", has its weights " +
                        (said ? "out x in" : "in x out") + "; that counts");
      break;
    }
}

// ---- compute
// ---------------------------------------------------------------------------------------------------------

struct ModuleReport {
  std::string name;
  Index size = 0;
  MergeReport merge;
};

/// What storage kept of the updates, module by module and in all.
struct Results {
  std::vector<ModuleReport> modules;

  [[nodiscard]] double changed_share() const {
    double changed = 0, values = 0;
    for (const ModuleReport& m : modules) {
      changed += m.merge.changed_share * double(m.size);
      values += double(m.size);
    }
    return values > 0 ? changed / values : 0;
  }
  [[nodiscard]] double lost() const {
    double intended2 = 0, lost2 = 0;
    for (const ModuleReport& m : modules) {
      intended2 += m.merge.intended_norm * m.merge.intended_norm;
      lost2 += std::pow(m.merge.lost * m.merge.intended_norm, 2);
    }
    return intended2 > 0 ? std::sqrt(lost2 / intended2) : 0;
  }
  [[nodiscard]] double least_correlation() const {
    double worst = 1;
    for (const ModuleReport& m : modules) worst = std::min(worst, m.merge.correlation);
    return worst;
  }
  [[nodiscard]] std::size_t below(double correlation) const {
    return std::size_t(std::count_if(modules.begin(), modules.end(),
                                     [&](const ModuleReport& m) { return m.merge.correlation < correlation; }));
  }
};

PackedMerge packed_merge(const Options& o, Plan& p, Results& results) {
  return {p.base, o.limits(),
          [&p](const std::string& weight) {
            p.check.expect(p.base[weight]);
            const std::size_t k = p.of_tensor.at(weight);
            return stored_factors<float>(p.adapter.modules[k], p.in_by_out(k));
          },
          [&p, &results](const std::string& weight, const MergeReport& r) {
            const std::size_t k = p.of_tensor.at(weight);
            results.modules.push_back({p.adapter.modules[k].name, p.size(k), r});
          }};
}

/// What becomes of one tensor of the base; nothing where it stays.
std::optional<io::TensorRewrite> rewrite(const Options& o, Plan& p, PackedMerge& packed, Results& results,
                                         const io::TensorView& t) {
  const io::TensorSpec same{t.name(), t.dtype(), t.shape()};
  if (const auto k = p.of_bias.find(t.name()); k != p.of_bias.end())
    return io::TensorRewrite{{same}, [&p, t, k = k->second](io::SafeTensorsWriter& out) {
                               out.write(t.name(), merged_bias(t, p.adapter.modules[k]));
                             }};
  if (const auto k = p.of_part.find(t.name()); k != p.of_part.end()) {
    const std::string& weight = p.weight(k->second).name();
    return io::TensorRewrite{{packed.spec(weight, t.name())},
                             [&packed, name = t.name(), weight](io::SafeTensorsWriter& out) {
                               out.write(name, packed.bytes(weight, name));
                             }};
  }
  if (const auto r = p.replaced.find(t.name()); r != p.replaced.end())
    return io::TensorRewrite{
        {{t.name(), r->second->spec.dtype, r->second->spec.shape}},
        [saved = r->second, name = t.name()](io::SafeTensorsWriter& out) { out.write(name, saved->bytes); }};
  const auto k = p.of_tensor.find(t.name());
  if (k == p.of_tensor.end()) return std::nullopt;
  return io::TensorRewrite{{same}, [&o, &p, &results, t, k = k->second](io::SafeTensorsWriter& out) {
                             MergeReport r;
                             p.check.expect(t);
                             const io::AdapterModule& m = p.adapter.modules[k];
                             out.write(t.name(), merged(o, t, m, p.in_by_out(k), r));
                             results.modules.push_back({m.name, t.size(), r});
                           }};
}

/// What would be lost, and nothing written.
Results simulate(const Options& o, Plan& p) {
  Results results;
  const PackedMerge packed = packed_merge(o, p, results);
  std::uint64_t bytes = 0;
  for (std::size_t k = 0; k < p.where.size(); ++k) bytes += p.weight(k).bytes().size();
  Progress progress(o.common, "merge", p.where.size(), "tensors", bytes);
  for (std::size_t k = 0; k < p.where.size(); ++k) {
    throw_if_interrupted();
    MergeReport r;
    const io::TensorView& weight = p.weight(k);
    const io::AdapterModule& m = p.adapter.modules[k];
    if (weight.dtype() == io::Dtype::U8) {
      r = packed.report(weight.name());
    } else {
      p.check.expect(weight);
      (void)merged(o, weight, m, p.in_by_out(k), r);
    }
    weight.drop();
    results.modules.push_back({m.name, p.size(k), r});
    progress.advance(weight.bytes().size(), m.name);
  }
  return results;
}

Results write_merged(const Options& o, Plan& p) {
  Results results;
  PackedMerge packed = packed_merge(o, p, results);
  const bool directory = !o.output.ends_with(".safetensors");
  remove_leftovers(o.common, {o.output});
  std::optional<NewDirectories> made;
  if (directory) made.emplace(o.output);
  std::unique_ptr<Finishing> finishing;
  io::StagedFiles files = stage_interruptibly(
      o.common, "merge", p.base, o.output, [&](const io::TensorView& t) { return rewrite(o, p, packed, results, t); },
      finishing);
  if (directory) {
    (void)stage_model_files(o.base, o.output, files);
    files.remove((fs::path(o.output) / io::changed_base_file).string());  // what was here may have been another base
  }
  files.commit();
  return results;
}

// ---- report
// ----------------------------------------------------------------------------------------------------------

Json to_json(const ModuleReport& m) {
  const MergeReport& r = m.merge;
  return {{"name", m.name},
          {"changed_share", r.changed_share},
          {"correlation", r.correlation},
          {"lost", r.lost},
          {"intended_norm", r.intended_norm},
          {"effective_norm", r.effective_norm},
          {"weight_norm", r.weight_norm}};
}

void print_report(const Options& o, Plan& p, const Results& results) {
  if (const std::size_t strangers = p.check.strangers(); strangers > 0)
    p.notes.push_back(text(strangers, " weights of the base are not the ones the adapter was made with"));
  const std::size_t refused = results.below(o.min_correlation);  // of a dry run; else the first one was an error
  if (o.dry_run && !o.allow_lossy && refused > 0)
    p.notes.push_back(text("without --dry-run the merge would be refused: ", refused, " modules correlate less than ",
                           number(o.min_correlation), " with what was intended (--allow-lossy merges anyway)"));
  for (const std::string& line : p.notes) note(o.common, line);
  Json modules = Json::array();
  for (const ModuleReport& m : results.modules) modules.push_back(to_json(m));
  const double share = results.changed_share(), lost = results.lost(), least = results.least_correlation();
  print(o.common,
        {{"command", "merge"},
         {"applied", p.where.size()},
         {"total", p.adapter.modules.size()},
         {"changed_share", share},
         {"lost", lost},
         {"least_correlation", least},
         {"base", p.check.verdict()},
         {"output", o.output},
         {"dry_run", o.dry_run},
         {"modules", std::move(modules)}},
        p.summary + "\n" + "stored values changed: " + number(100 * share) + " %; update lost to rounding: " +
            number(100 * lost) + " % of its norm; least correlation of a module: " + number(least) + "\n" +
            (o.dry_run ? "would write " : "wrote ") + o.output + "\n");
}

void run(const Options& o) {
  expect_different(o.base, o.output);
  expect_different(o.adapter, o.output);
  Plan plan(o);
  make_plan(o, plan);
  const Results results = o.dry_run ? simulate(o, plan) : write_merged(o, plan);
  print_report(o, plan, results);
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
  sub->callback([o, sub] {
    expect_used(sub, {{"--min-correlation", !o->allow_lossy, "with --allow-lossy", "it says what is not allowed"}});
    run(*o);
  });
}

const Registration registration{45, "merge", add_merge};

}  // namespace
}  // namespace lowrank::tool::merge_command
