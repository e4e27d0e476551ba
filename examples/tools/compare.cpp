// SPDX-License-Identifier: Apache-2.0
// lowrank compare: how the leading subspaces of two checkpoints, two adapters or two updates lie to each other.
#include <lowrank/linalg/factor_svd.hpp>
#include <lowrank/linalg/truncated_svd.hpp>
#include <lowrank/spectrum/alignment.hpp>
#include <lowrank/spectrum/subspace.hpp>

#include <cstdio>
#include <filesystem>

#include "spectrum_scan.hpp"

namespace lowrank::tool::compare_command {
namespace {

struct Options {
  ScanOptions scan;
  std::string a, b, base, filter;
  Index k = 8;
};

bool is_adapter(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(std::filesystem::path(path) / "adapter_config.json", ignored);
}

Svd<float> leading(MatrixView<const float> W, Index k) {
  auto t = truncated_svd<float>(dense_operator<float, float>(W), std::min({k, W.rows(), W.cols()}),
                                {.energy_tolerance = 0, .residual_tolerance = 1e-5});
  return std::move(static_cast<Svd<float>&>(t));
}

/// Columns beyond the range of a rank-deficient update are no directions of it.
void trim(Svd<float>& s, Index k) {
  Index keep = 0;
  while (keep < std::min(k, Index(s.S.size())) && s.S[std::size_t(keep)] > 1e-6F * s.S[0]) ++keep;
  s.S.resize(std::size_t(keep));
  s.U = Matrix<float>(s.U.view().middle_cols(0, keep));
  s.V = Matrix<float>(s.V.view().middle_cols(0, keep));
}

/// `difference`: ‖A − B‖_F / ‖A‖_F.
Json entry(const std::string& name, Svd<float> a, Svd<float> b, double difference, Index k) {
  const Index m = a.U.rows(), n = a.V.rows();
  trim(a, k);
  trim(b, k);
  Json j = {{"name", name}, {"rows", m}, {"cols", n}, {"relative_difference", finite(difference)}};
  if (a.S.empty() || b.S.empty()) {
    j["note"] = "one of the two is zero";
    return j;
  }
  const auto side = [&](const Matrix<float>& U, const Matrix<float>& V) {
    const auto phi = subspace_similarity<float>(U.view(), V.view());
    const auto angles = principal_angles<float>(U.view(), V.view());
    Json grid = Json::array();
    for (Index i = 0; i < phi.rows(); ++i) {
      Json row = Json::array();
      for (Index l = 0; l < phi.cols(); ++l) row.push_back(phi(i, l));
      grid.push_back(std::move(row));
    }
    return Json{{"phi", phi(phi.rows() - 1, phi.cols() - 1)},
                {"noise_phi", double(std::max(U.cols(), V.cols())) / double(U.rows())},
                {"grassmann", grassmann_distance(angles)},
                {"chordal", chordal_distance(angles)},
                {"angles", angles},
                {"grid", std::move(grid)}};
  };
  j["left"] = side(a.U, b.U);
  j["right"] = side(a.V, b.V);
  return j;
}

Json adapters_entry(const io::AdapterModule& a, const io::AdapterModule& b, Index k) {
  LoraFactors<float> minus = b.factors;
  minus.scale = -minus.scale;
  const LoraFactors<float> terms[] = {a.factors, minus};
  const double norm = frobenius_norm(a.factors);
  const double difference = frobenius_norm(std::span<const LoraFactors<float>>(terms)) / norm;
  return entry(a.name, svd(a.factors), svd(b.factors), difference, k);
}

void run(const Options& o) {
  std::vector<ScanJob> jobs;
  std::vector<Skipped> skipped;
  const auto shapes = [](Index m, Index n, Index p, Index q) {
    return lowrank::detail::text("is ", lowrank::detail::shape_text(m, n), " in A and ",
                                 lowrank::detail::shape_text(p, q), " in B");
  };
  std::optional<io::PeftAdapter> adapter_a, adapter_b;
  std::optional<io::Checkpoint> a, b, base;
  std::vector<MatrixTensor> list_a, list_b, list_base;
  if (is_adapter(o.a) != is_adapter(o.b)) throw UsageError("compare: give two adapters or two checkpoints");
  if (is_adapter(o.a)) {
    if (!o.base.empty()) throw UsageError("compare: adapters are updates already, --base is for checkpoints");
    adapter_a.emplace(io::read_peft(o.a));
    adapter_b.emplace(io::read_peft(o.b));
    for (const auto& x : adapter_a->modules) {
      if (!selected(x.name, o.filter)) continue;
      const auto* y = adapter_b->find(x.name);
      const auto& f = x.factors;
      if (y == nullptr)
        skipped.push_back({x.name, "is only in A", true});
      else if (y->factors.out_features() != f.out_features() || y->factors.in_features() != f.in_features())
        skipped.push_back(
            {x.name, shapes(f.out_features(), f.in_features(), y->factors.out_features(), y->factors.in_features()),
             true});
      else
        jobs.push_back(
            {x.name, 1, double(f.A.size() + f.B.size()), [&x, y, &o] { return adapters_entry(x, *y, o.k); }});
    }
    for (const auto& y : adapter_b->modules)
      if (selected(y.name, o.filter) && adapter_a->find(y.name) == nullptr)
        skipped.push_back({y.name, "is only in B", true});
  } else {
    a.emplace(o.a);
    b.emplace(o.b);
    std::vector<Skipped> ignored;
    list_a = matrices_of(*a, skipped);
    list_b = matrices_of(*b, ignored);
    if (!o.base.empty()) {
      base.emplace(o.base);
      list_base = matrices_of(*base, ignored);
    }
    for (const auto& x : list_a) {
      if (!selected(x.name, o.filter)) continue;
      const MatrixTensor* y = find_matrix(list_b, x.name);
      const MatrixTensor* w = o.base.empty() ? nullptr : find_matrix(list_base, x.name);
      if (y == nullptr || (!o.base.empty() && w == nullptr)) {
        skipped.push_back({x.name, y == nullptr ? "is only in A" : "is not in the base", true});
        continue;
      }
      if (x.rows != y->rows || x.cols != y->cols || (w != nullptr && (w->rows != x.rows || w->cols != x.cols))) {
        skipped.push_back({x.name, shapes(x.rows, x.cols, y->rows, y->cols), true});
        continue;
      }
      jobs.push_back({x.name, x.bytes() + y->bytes(), double(x.rows) * double(x.cols), [&x, y, w, &o] {
                        Matrix<float> A = values_of<float>(x), B = values_of<float>(*y);
                        if (w != nullptr) {
                          const Matrix<float> W = values_of<float>(*w);
                          for (Index i = 0; i < A.size(); ++i) A.data()[i] -= W.data()[i], B.data()[i] -= W.data()[i];
                        }
                        double norm = 0, difference = 0;
                        for (Index i = 0; i < A.size(); ++i) {
                          norm += double(A.data()[i]) * double(A.data()[i]);
                          difference += std::pow(double(A.data()[i]) - double(B.data()[i]), 2);
                        }
                        Json j = entry(x.name, leading(A.view(), o.k), leading(B.view(), o.k),
                                       std::sqrt(difference / norm), o.k);
                        say_storage(j, {{"a_scale", &x}, {"b_scale", y}, {"base_scale", w}});
                        return j;
                      }});
    }
    for (const auto& y : list_b)
      if (selected(y.name, o.filter) && find_matrix(list_a, y.name) == nullptr)
        skipped.push_back({y.name, "is only in B", true});
  }
  note_quantised(o.scan.common, {&list_a, &list_b, &list_base});
  if (jobs.empty() && skipped.empty()) throw IoError(o.a, "holds no matrices");
  auto result = run_scan(o.scan, "compare", fingerprint({o.a, o.b, o.base}, "compare k " + std::to_string(o.k)), jobs);
  result.skipped.insert(result.skipped.end(), skipped.begin(), skipped.end());
  std::string table = "difference  φ left  noise  φ right  noise  matrix\n";
  char line[96];
  for (const Json& j : result.matrices) {
    const auto at = [&](const char* side, const char* key) {
      return j.contains(side) ? j[side][key].get<double>() : NAN;
    };
    std::snprintf(line, sizeof line, "%10.4g %7.4f %6.4f %8.4f %6.4f  ",
                  j["relative_difference"].is_number() ? j["relative_difference"].get<double>() : NAN,
                  at("left", "phi"), at("left", "noise_phi"), at("right", "phi"), at("right", "noise_phi"));
    table += line + j["name"].get<std::string>() + "\n";
  }
  finish_scan(o.scan, std::move(result),
              {{"command", "compare"},
               {"a", o.a},
               {"b", o.b},
               {"base", o.base.empty() ? Json(nullptr) : Json(o.base)},
               {"k", o.k}},
              table);
}

void add_compare(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("compare", "Leading subspaces of two checkpoints, updates or adapters: similarity and angles");
  sub->add_option("a", o->a, "A checkpoint or a PEFT adapter directory")->required();
  sub->add_option("b", o->b, "Another of the same kind")->required();
  sub->add_option("--base", o->base, "Compare A - BASE with B - BASE");
  sub->add_option("-k,--k", o->k, "Dimension of the subspaces")->capture_default_str()->check(CLI::PositiveNumber);
  sub->add_option("--filter", o->filter, "Only matrices whose name contains this");
  o->scan.add_to(sub);
  sub->callback([o] { run(*o); });
}

const Registration registration{62, "compare", add_compare};

}  // namespace
}  // namespace lowrank::tool::compare_command
