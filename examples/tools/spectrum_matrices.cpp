// SPDX-License-Identifier: Apache-2.0
// What is a matrix in a checkpoint, and which matrices belong to each other.
#include "spectrum_matrices.hpp"

#include <algorithm>
#include <cstring>
#include <filesystem>

namespace lowrank::tool {
namespace {

/// Whether a tensor is a part of a 4-bit weight and none itself.
bool is_packed_part(const io::Checkpoint& checkpoint, const std::string& name) {
  for (const char* part : {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"})
    if (name.ends_with(part))
      return !io::bitsandbytes_type(checkpoint, name.substr(0, name.size() - std::strlen(part))).empty();
  return name.find(io::bitsandbytes_state_suffix) != std::string::npos;
}

/// Three dimensions alone do not make a stack of matrices: a one-dimensional convolution has them too. Mixtures of
/// experts say so in the name; 8-bit floats of three dimensions are written for nothing else.
bool is_stack(const io::TensorView& t) {
  if (t.shape().size() != 3) return false;
  if (io::is_float8(t.dtype())) return true;
  return t.name().find("experts") != std::string::npos || t.name().find("block_sparse_moe") != std::string::npos;
}

/// The entry of a 4-bit weight. What is wrong with it is said when its turn comes, for the others are well.
MatrixTensor packed(const io::Checkpoint& checkpoint, const io::TensorView& t) {
  MatrixTensor m{t.name(), t, 0, 0, 0, MatrixTensor::Storage::bitsandbytes4, &checkpoint};
  try {
    const auto state = io::read_bitsandbytes_state(checkpoint, t.name());
    m.type = state.type;
    m.rows = state.rows;
    m.cols = state.cols;
    if (m.rows == 0 || m.cols == 0) m.problem = text(t.file().path(), ": '", t.name(), "': is empty");
  } catch (const Error& e) {
    m.problem = e.what();
  }
  return m;
}

/// As partner_of, for anything found by name.
std::string shapes(Index m, Index n, Index p, Index q, const std::string& where) {
  return text("is ", shape_text(m, n), " here and ", shape_text(p, q), " in ", where);
}

}  // namespace

std::vector<MatrixTensor> matrices_of(const io::Checkpoint& checkpoint, std::vector<Skipped>& skipped) {
  using Storage = MatrixTensor::Storage;
  std::vector<MatrixTensor> list;
  checkpoint.for_each([&](const io::TensorView& t) {
    const auto& s = t.shape();
    const std::string& name = t.name();
    if (is_packed_part(checkpoint, name) || io::is_float8_scale(checkpoint, name) || io::is_int8_part(checkpoint, name))
      return;
    const bool int8 = !io::int8_scale_name(checkpoint, name).empty();
    if (!io::bitsandbytes_type(checkpoint, name).empty()) {
      list.push_back(packed(checkpoint, t));
    } else if (s.size() < 2) {
      skipped.push_back({name, SkipReason::vector, "has fewer than two dimensions"});
    } else if (!int8 && !io::is_convertible_float(t.dtype())) {
      skipped.push_back({name, SkipReason::type, "is stored as " + std::string(io::dtype_name(t.dtype()))});
    } else if (t.size() == 0) {
      skipped.push_back({name, SkipReason::empty, "is empty"});
    } else {
      const Storage storage = int8                       ? Storage::bitsandbytes8
                              : io::is_float8(t.dtype()) ? Storage::float8
                                                         : Storage::plain;
      if (is_stack(t))
        for (Index e = 0; e < Index(s[0]); ++e)
          list.push_back({text(name, "[", e, "]"), t, Index(s[1]), Index(s[2]), e, storage, &checkpoint});
      else
        list.push_back({name, t, Index(s[0]), t.size() / Index(s[0]), 0, storage, &checkpoint});
    }
  });
  std::stable_sort(list.begin(), list.end(), [](const auto& a, const auto& b) {
    return a.name != b.name ? a.name < b.name : a.tensor.name() == a.name && b.tensor.name() != b.name;
  });
  const auto again = std::unique(list.begin(), list.end(), [&](const auto& a, const auto& b) {
    if (a.name == b.name)
      skipped.push_back({b.name, SkipReason::twice, "is the name of a tensor and of a slice of " + b.tensor.name()});
    return a.name == b.name;
  });
  list.erase(again, list.end());
  return list;
}

const MatrixTensor* find_matrix(const std::vector<MatrixTensor>& list, const std::string& name) {
  const auto it =
      std::lower_bound(list.begin(), list.end(), name, [](const auto& m, const auto& n) { return m.name < n; });
  return it != list.end() && it->name == name ? &*it : nullptr;
}

bool selected(const std::string& name, const std::string& filter) {
  return filter.empty() || name.find(filter) != std::string::npos;
}

const MatrixTensor* partner_of(const MatrixTensor& x, const std::vector<MatrixTensor>& list, const std::string& where,
                               std::vector<Skipped>& skipped) {
  const MatrixTensor* y = find_matrix(list, x.name);
  const bool readable = x.problem.empty() && (y == nullptr || y->problem.empty());  // else the shape is not known
  if (y == nullptr)
    skipped.push_back({x.name, SkipReason::missing, "is not in " + where});
  else if (readable && (y->rows != x.rows || y->cols != x.cols))
    skipped.push_back({x.name, SkipReason::shape, shapes(x.rows, x.cols, y->rows, y->cols, where)});
  else
    return y;
  return nullptr;
}

std::vector<MatrixPair> pairs_of(const std::vector<MatrixTensor>& first, const std::vector<MatrixTensor>& second,
                                 const std::string& where, const std::string& filter, std::vector<Skipped>& skipped) {
  std::vector<MatrixPair> pairs;
  for (const auto& x : first)
    if (selected(x.name, filter))
      if (const auto* y = partner_of(x, second, where, skipped)) pairs.push_back({&x, y});
  for (const auto& y : second)
    if (selected(y.name, filter) && find_matrix(first, y.name) == nullptr)
      skipped.push_back({y.name, SkipReason::missing, "is only in " + where});
  return pairs;
}

std::vector<ModulePair> pairs_of(const io::PeftAdapter& adapter, const std::vector<MatrixTensor>& weights,
                                 const std::string& filter, std::vector<Skipped>& skipped) {
  std::vector<ModulePair> pairs;
  const ModelFamily* family = weights.empty() ? nullptr : family_of(*weights.front().checkpoint);
  for (const auto& module : adapter.modules) {
    if (!selected(module.name, filter)) continue;
    const MatrixTensor* w = find_matrix(weights, module.name + ".weight");
    const bool transposed =
        lies_transposed(module.kind, stored_in_by_out(family, module.name, adapter.config.fan_in_fan_out));
    Index m = module.factors.out_features(), n = module.factors.in_features();
    if (transposed) std::swap(m, n);
    if (w == nullptr)
      skipped.push_back({module.name, SkipReason::missing, "the adapter's module is not in the checkpoint"});
    else if (w->problem.empty() && (w->rows != m || w->cols != n))
      skipped.push_back(
          {module.name, SkipReason::shape,
           text("the adapter's update of it is ", shape_text(m, n), ", the weight ", shape_text(w->rows, w->cols))});
    else
      pairs.push_back({&module, w, transposed});
  }
  return pairs;
}

std::vector<std::pair<const io::AdapterModule*, const io::AdapterModule*>> pairs_of(const io::PeftAdapter& first,
                                                                                    const io::PeftAdapter& second,
                                                                                    const std::string& where,
                                                                                    const std::string& filter,
                                                                                    std::vector<Skipped>& skipped) {
  std::vector<std::pair<const io::AdapterModule*, const io::AdapterModule*>> pairs;
  for (const auto& x : first.modules) {
    if (!selected(x.name, filter)) continue;
    const auto* y = second.find(x.name);
    const auto &f = x.factors, &g = y != nullptr ? y->factors : f;
    if (y == nullptr)
      skipped.push_back({x.name, SkipReason::missing, "is not in " + where});
    else if (g.out_features() != f.out_features() || g.in_features() != f.in_features())
      skipped.push_back({x.name, SkipReason::shape,
                         shapes(f.out_features(), f.in_features(), g.out_features(), g.in_features(), where)});
    else
      pairs.emplace_back(&x, y);
  }
  for (const auto& y : second.modules)
    if (selected(y.name, filter) && first.find(y.name) == nullptr)
      skipped.push_back({y.name, SkipReason::missing, "is only in " + where});
  return pairs;
}

bool is_adapter(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(std::filesystem::path(path) / "adapter_config.json", ignored);
}

void say_storage(Json& j, std::initializer_list<std::pair<const char*, const MatrixTensor*>> matrices) {
  using Storage = MatrixTensor::Storage;
  for (const auto& [key, m] : matrices) {
    if (m == nullptr || m->storage == Storage::plain) continue;
    if (m->storage == Storage::float8) {
      const auto scales = io::float8_scales(*m->checkpoint, m->tensor, m->slice);
      j[key] = scales.name.empty() ? "none" : scales.name + ", one a " + scales.per();
      if (scales.name.empty()) continue;
    } else if (m->storage == Storage::bitsandbytes8) {
      j[key] = io::int8_scale_name(*m->checkpoint, m->name) + ", one a row";
    }
    j["dequantised"] = true;
  }
}

void note_quantised(const Common& common, std::initializer_list<const std::vector<MatrixTensor>*> lists) {
  using Storage = MatrixTensor::Storage;
  for (const auto* list : lists) {
    std::size_t dequantised = 0, bare = 0;
    for (const MatrixTensor& m : *list) {
      const bool is_bare =
          m.storage == Storage::float8 && io::float8_scale_name(*m.checkpoint, m.tensor.name()).empty();
      bare += is_bare;
      dequantised += m.storage != Storage::plain && !is_bare;
    }
    if (dequantised > 0)
      note(common, std::to_string(dequantised) + " quantised weights are dequantised for the analysis");
    if (bare > 0)
      note(common, std::to_string(bare) + " 8-bit weights have no scale: their values are taken as they are");
  }
}

}  // namespace lowrank::tool
