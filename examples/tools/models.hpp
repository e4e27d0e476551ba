// SPDX-License-Identifier: Apache-2.0
// What the subcommands that work on checkpoints share: modules and targets, weights of any stored type, adapters that
// must fit a base.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/text.hpp"
#include "interrupt.hpp"
#include "lowrank/io/checkpoint.hpp"
#include "lowrank/io/model_config.hpp"
#include "lowrank/io/peft.hpp"
#include "lowrank/model/targets.hpp"
#include "tool.hpp"

namespace lowrank::tool {

/// The modules of a checkpoint: tensors named "<module>.weight". Matrices are linear layers or embeddings, tensors of
/// four dimensions convolutions, everything else carries no adapter.
struct Modules {
  std::vector<ModuleInfo> infos;
  std::vector<io::TensorView> weights;    ///< weights[i] belongs to infos[i]
  std::optional<io::ModelConfig> config;  ///< of the config.json beside the weights
  const ModelFamily* family = nullptr;    ///< what its model_type says, where that is known

  /// `packed`: 4-bit weights of bitsandbytes are matrices too, of the shape they have unpacked.
  explicit Modules(const io::Checkpoint& checkpoint, bool packed = false);
  [[nodiscard]] std::optional<std::size_t> find(std::string_view name) const;
  /// Says for every linear layer whether its weight lies in×out: the family knows, of others the flag counts.
  /// **Throws** IoError naming config.json when the flag is given and the family has no such layer.
  void settle_orientation(bool fan_in_fan_out);
  /// Whether the weight lies in×out: as the family has it; where none is known, as an adapter's configuration says.
  [[nodiscard]] bool in_by_out(std::size_t i, bool fan_in_fan_out) const;
  /// Whether PEFT must be told so of an adapter of these modules.
  [[nodiscard]] bool need_fan_in_fan_out(const std::vector<std::size_t>& selected) const;
  /// PEFT's task_type of the model, as config.json tells; CAUSAL_LM where nothing does.
  [[nodiscard]] std::string task_type() const;
  /// What somebody should know whose model is of no known family, or whose checkpoint has other names than the class
  /// it was saved from, so that PEFT will not find the modules of an adapter; empty otherwise.
  [[nodiscard]] std::string family_note(const std::vector<std::size_t>& selected) const;
};

/// The family that a checkpoint's config.json names, null where there is none or it is not known.
const ModelFamily* family_of(const io::Checkpoint& checkpoint);
/// Whether a linear layer's weight lies in×out: as the family has it, else as an adapter's configuration says.
bool stored_in_by_out(const ModelFamily* family, const std::string& module, bool fan_in_fan_out);

/// --targets, --exclude, --layers.
struct TargetArguments {
  std::string targets = "all-linear", exclude;
  std::vector<Index> layers;
  void add_to(CLI::App* sub);
  [[nodiscard]] TargetSelection select(const Modules& modules) const;
};

/// What to write as target_modules so that PEFT adapts exactly the selected modules: the shortest suffixes if they
/// select nothing else, otherwise the full names.
std::vector<std::string> target_list(const Modules& modules, const std::vector<std::size_t>& selected);

/// Calls f with a value of the type the tensor is stored as: float, double, bf16 or f16. Throws IoError for other
/// types, `otherwise` behind their name.
template <class F>
auto with_stored_type(const io::TensorView& t, const char* otherwise, F&& f) {
  switch (t.dtype()) {
    case io::Dtype::F32:
      return f(float{});
    case io::Dtype::F64:
      return f(double{});
    case io::Dtype::BF16:
      return f(bf16{});
    case io::Dtype::F16:
      return f(f16{});
    default:
      t.fail(common::text("is stored as ", io::dtype_name(t.dtype()), otherwise));
  }
}

/// Calls f with the weight as stored, MatrixView<const S> for S in float, double, bf16, f16. It is read, not mapped: a
/// file truncated meanwhile is an error, and no signal. Throws IoError for other types.
template <class F>
auto with_weight(const io::TensorView& t, F&& f) {
  return with_stored_type(t, "; F32, F64, BF16 and F16 can be used", [&]<class S>(S) {
    Matrix<S> copy;
    copy.resize(t.rows(), t.cols());
    t.copy_bytes(reinterpret_cast<std::byte*>(copy.data()));
    return f(MatrixView<const S>(copy.view()));
  });
}

/// Throws IoError naming tensor and element when there is a NaN or an infinity among the weights.
void expect_finite_weight(const io::TensorView& t);
/// Whether two tensors are the same to the last bit.
bool same_bytes(const io::TensorView& a, const io::TensorView& b);

/// Factors as the adapter files keep them.
LoraFactors<float> to_float(LoraFactors<double>&& f);
inline LoraFactors<float> to_float(LoraFactors<float>&& f) { return std::move(f); }

/// The stream of random numbers of a module: from its name, so that it depends on neither what else is selected nor how
/// the checkpoint is laid out.
inline std::uint64_t module_stream(std::string_view name) { return io::xxh64(name); }

/// "f32", "bf16", "f16" of an option.
io::Dtype factor_dtype(const std::string& name);
/// Rounds the factors to the type they will be stored in.
void round_factors(LoraFactors<float>& f, io::Dtype dtype);

/// For every module of the adapter, the index of the weight it belongs to. Throws IoError listing modules without a
/// weight of the right shape; `summary` receives "N of M modules of the adapter applied".
std::vector<std::size_t> match_adapter(const std::string& path, const io::PeftAdapter& adapter, const Modules& modules,
                                       std::string& summary);

/// The path of a checkpoint as it is; throws IoError when it is an adapter's directory.
const std::string& checkpoint_path(const std::string& path);

/// A PEFT adapter; throws IoError naming the module whose factors hold NaN or infinity.
io::PeftAdapter read_adapter(const std::string& path);
/// A line on stderr when modules are DoRA's and what is done looks at s·B·A alone.
void note_dora(const Common& common, const std::string& path, const io::PeftAdapter& adapter);
/// The check of read_adapter alone.
void expect_finite_factors(const std::string& path, const io::PeftAdapter& adapter);

/// Throws IoError when two paths are the same place, whatever they are spelt, or the output is a file of the input's
/// directory.
void expect_different(const std::string& input, const std::string& output);

/// An existing path as it can be found from anywhere.
std::string absolute_path(const std::string& path);

/// The directory of a checkpoint: itself, or where the file is.
std::string model_directory(const std::string& checkpoint);

/// Whether ΔW = s·B·A lies transposed on the stored weight: on embeddings always, on linear layers where they are
/// stored in x out. PEFT does the same: its embedding layers do not look at fan_in_fan_out.
inline bool lies_transposed(ModuleKind kind, bool in_by_out) {
  return kind == ModuleKind::embedding || (kind == ModuleKind::linear && in_by_out);
}
inline bool lies_transposed(const ModuleInfo& m) { return lies_transposed(m.kind, m.in_by_out); }

/// "a base that was changed with it (pissa, residual)"; `it` may be another adapter.
std::string changed_base_phrase(const io::ChangedBase& base, const std::string& it = "it");

/// The flag by which somebody who knows better overrides the marks of a changed base.
inline constexpr const char* changed_base_flag = "--changed-base";

/// Adds the small files that make a directory a model (config.json, the tokenizer, ...) to those of the output: every
/// file of a directory that holds no weights and is no part of an adapter; of a single .safetensors file, those beside
/// it that have the usual names. `change`, where given, may change the text of config.json. Returns whether there was a
/// config.json.
bool stage_model_files(const std::string& checkpoint, const std::string& directory, io::StagedFiles& files,
                       const std::function<std::string(const std::string& path, std::string text)>& change = {});

/// stage_checkpoint with a progress bar, stopping between tensors when interrupted. When all of them are computed
/// nothing stops it any more: `finishing` lasts until the caller has put everything in place.
template <class Rewrite>
[[nodiscard]] io::StagedFiles stage_interruptibly(const Common& common, const std::string& what,
                                                  const io::Checkpoint& from, const std::string& output,
                                                  Rewrite&& rewrite, std::unique_ptr<Finishing>& finishing) {
  std::uint64_t bytes = 0;
  from.for_each([&](const io::TensorView& t) { bytes += t.bytes().size(); });
  std::size_t left = from.size();
  Progress progress(common, what, from.size(), "tensors", bytes);
  return io::stage_checkpoint(from, output, rewrite, [&](const io::TensorView& t) {
    progress.advance(t.bytes().size(), t.name());
    throw_if_interrupted();
    if (--left == 0) finishing = std::make_unique<Finishing>();
  });
}

/// "%.4g".
std::string number(double x);

}  // namespace lowrank::tool
